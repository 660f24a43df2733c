// Decoding a block, for any instruction set. What is done number by number is the instruction
// set's: `Simd` (kernels_*.cpp) has
//   Lanes                     the states of a group's lanes
//   Lanes::step               decodes one channel of a tile
//   turn(tile, first, rows)   a tile's columns of 16 tokens as rows
//   spread                    bytes to the channels that are not constant
#pragma once

#include "channel/strips.hpp"

namespace kvzip::channel {
namespace {

// The words still to come. A step reads less than kReach bytes from `at` on without asking; near
// the end it reads a copy with room behind it.
class Words {
 public:
  Words(const std::uint8_t* data, std::size_t count) : at(data), end_(data + 2 * count) {}

  const std::uint8_t* at;

  // To be called before each step; false when a step has read more than there was.
  bool ready() {
    if (end_ - at >= kReach) return true;
    if (end_ < at) return false;
    if (!copied_) {
      const auto rest = std::size_t(end_ - at);
      std::memset(copy_, 0, sizeof copy_);
      std::memcpy(copy_, at, rest);
      at = copy_;
      end_ = copy_ + rest;
      copied_ = true;
    }
    return true;
  }
  bool all_read() const { return at == end_; }

 private:
  static constexpr std::ptrdiff_t kReach = 2 * kLanes + 64;
  const std::uint8_t* end_;
  bool copied_ = false;
  std::uint8_t copy_[2 * kReach];
};

inline std::uint64_t first_ones(std::size_t n) { return n < 64 ? (std::uint64_t(1) << n) - 1 : ~std::uint64_t(0); }

// Numbers of eight tokens: a turned tile's, plus the channels' bases, with their mantissas.
template <typename T, int M>
inline void merge(const T (*numbers)[kStrip], const T* base, const std::uint8_t* mantissas, T* corner,
                  std::ptrdiff_t stride, std::size_t rows, std::size_t width) {
  constexpr int R = M % 8, B = M / 8;
  Row packed[R], fields[8];
  for (int j = 0; j < R; ++j) packed[j] = row_at(mantissas + (8 * B + j) * kStrip);
  unpack<R>(packed, fields);
  for (std::size_t i = 0; i < rows; ++i, corner += stride) {
    std::uint8_t field[kStrip];
    std::memcpy(field, &fields[i], kStrip);
    const std::uint8_t* low = mantissas + i * kStrip;
    T row[kStrip];
    for (int c = 0; c < kStrip; ++c) {
      std::uint32_t m = std::uint32_t(field[c]) << 8 * B;
      for (int j = 0; j < B; ++j) m |= std::uint32_t(low[8 * j * kStrip + c]) << 8 * j;
      row[c] = T(T(numbers[i][c] + base[c]) | m);
    }
    std::memcpy(corner, row, width == kStrip ? sizeof row : width * sizeof(T));
  }
}

template <class Simd, typename T, int M>
bool decode_block(const Tables& tables, const Block<T>& block, const Coded& coded) {
  constexpr std::size_t kRows = rows_of_octet(M);
  alignas(64) std::uint32_t states[kLanes];
  const std::size_t all_lanes = least(kLanes, block.tokens);
  for (std::uint32_t& x : states) x = kLow;
  std::memcpy(states, coded.states, 4 * all_lanes);
  for (std::uint32_t x : states)
    if (x < kLow) return false;
  typename Simd::Lanes lanes(states);

  Words words(coded.words, coded.word_count);
  const std::uint8_t* mantissas = coded.mantissas;
  const std::uint8_t* escapes = coded.escapes;
  const std::uint8_t* const escapes_end = escapes + 2 * coded.escape_count;
  Tile<T> tile;
  alignas(64) T base[kStrip];
  alignas(64) T turned[16][kStrip];
  alignas(64) std::uint8_t spread[kRows * kStrip];

  const Strips strips(block.batch, tables.heads, block.tokens, tables.dim);
  const std::size_t count = strips.count();
  for (std::size_t s = 0; s < count; ++s) {
    const Strip strip = strips[s];
    const Channel* channels = tables.channels + strip.head * tables.dim + strip.channel;
    // Lanes without a token in the last groups are done, and stay as they are.
    if (strip.lanes < kLanes && !lanes.limit(strip.lanes)) return false;
    std::uint64_t live = 0;
    for (std::size_t c = 0; c < strip.width; ++c) {
      live |= std::uint64_t(!channels[c].constant) << c;
      base[c] = T(channels[c].constant ? channels[c].number : std::uint32_t(channels[c].base) << M);
    }
    if (live != first_ones(kStrip)) std::memset(&tile, 0, sizeof tile);
    for (std::size_t c = 0; c < strip.width; ++c) {
      if (!(live >> c & 1)) continue;
      if (!words.ready()) return false;
      std::uint64_t escaped[kLanes / 64];
      const bool first = c % Tile<T>::kInWord == 0;
      if (lanes.step(tables.decoders[channels[c].shape], &words.at, tile.column(c),
                     Tile<T>::template shift<M>(c), std::uint32_t(T(-1)) >> M, first, escaped))
        for (int h = 0; h < kLanes / 64; ++h)
          for (std::uint64_t left = escaped[h]; left; left &= left - 1) {
            const int j = 64 * h + __builtin_ctzll(left);
            if (escapes == escapes_end) return false;
            std::uint16_t value;
            std::memcpy(&value, escapes, 2);
            escapes += 2;
            // The base is added to all of them later.
            const T number = T(T(std::uint32_t(value) << M) - base[c]);
            std::memcpy(reinterpret_cast<T*>(tile.column(c) + j) + c % Tile<T>::kInWord, &number,
                        sizeof number);
          }
    }
    const auto live_count = std::size_t(__builtin_popcountll(live));
    T* const corner = strip.corner(block);
    for (std::size_t o = 0; o < strip.lanes; o += 8) {
      if (o % 16 == 0) Simd::turn(tile, o, turned);
      const std::uint8_t* rows = mantissas;
      if (live_count < kStrip) {
        Simd::spread(mantissas, kRows, live, live_count, spread);
        rows = spread;
      }
      merge<T, M>(turned + o % 16, base, rows, corner + std::ptrdiff_t(o) * block.token_stride,
                  block.token_stride, least(8, strip.lanes - o), strip.width);
      mantissas += kRows * live_count;
    }
  }
  // The encoder began at the lowest state, so the decoder must end there.
  return words.all_read() && escapes == escapes_end && lanes.done();
}

}  // namespace
}  // namespace kvzip::channel
