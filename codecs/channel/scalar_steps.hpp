// StripWork in plain C++: the whole of the scalar kernels, and what other instruction sets do not
// have a better way for.
#pragma once

#include "channel/decode.hpp"
#include "channel/encode.hpp"

namespace kvzip::channel {
namespace {

struct ScalarSteps {
  template <typename T>
  using Decoded = Tile<T>;

  class Lanes : public StoredLanes {
   public:
    using StoredLanes::StoredLanes;

    // In passes over all lanes, each with short chains of dependent instructions and no branch,
    // since nothing here can be foreseen; compilers turn the second and the last into vectors.
    template <typename T, int M>
    bool strip(StripWork<T>& work) {
      return each_channel<T, M>(*this, work);
    }

    bool step(const Decoder& d, const std::uint8_t** words, std::uint32_t* out, int shift,
              std::uint32_t value_mask, bool first, std::uint64_t* escaped) {
      std::uint32_t own[kLanes], other[kLanes], next[kLanes], takes[kLanes];
      for (std::size_t j = 0; j < kLanes; ++j) {
        const std::uint32_t* entry = d.entry + (x_[j] >> 5 & (kBuckets - 1));
        own[j] = entry[0];
        other[j] = entry[kBuckets];
      }
      for (std::size_t j = 0; j < kLanes; ++j) {
        const std::uint32_t x = x_[j];
        const bool second = (x << 27 | ((1u << 27) - 1)) >= own[j];
        const std::uint32_t add = second ? other[j] >> kAddAt : 0;
        const std::uint32_t e = second ? other[j] : own[j];
        const std::uint32_t y = (e & kFreqMask) * (x >> kProbBits) + (x & (kBucketSlots - 1)) + add;
        own[j] = e;
        // All ones where a lane takes a word, or none; and the state with room for it.
        takes[j] = 0u - std::uint32_t(y < kLow);
        next[j] = (y & ~takes[j]) | (y << 16 & takes[j]);
      }
      const std::uint8_t* p = *words;
      for (std::size_t j = 0; j < lanes_; ++j) {
        std::uint16_t word;
        std::memcpy(&word, p, 2);
        x_[j] = next[j] | (word & takes[j]);
        p += takes[j] & 2;
      }
      *words = p;
      const std::uint32_t before = first ? 0 : ~0u;
      std::uint32_t all = 0;
      for (std::size_t j = 0; j < kLanes; ++j) {
        out[j] = (out[j] & before) | (own[j] >> kValueAt & value_mask) << shift;
        all |= own[j];
      }
      if (!(all & kEscapeBit)) return false;
      escaped[0] = escaped[1] = 0;
      for (std::size_t j = 0; j < lanes_; ++j)
        escaped[j / 64] |= std::uint64_t((own[j] & kEscapeBit) != 0) << j % 64;
      return true;
    }
  };

  class EncoderLanes {
   public:
    void load(const std::uint32_t* states) { std::memcpy(x_, states, sizeof x_); }
    void store(std::uint32_t* states) const { std::memcpy(states, x_, sizeof x_); }

    bool step(const Encoder& e, std::uint32_t base, int value_bits, const std::uint32_t* column,
              int shift, std::size_t lanes, Sink* sink) {
      // In passes, as in decoding.
      const std::uint32_t mask = (1u << value_bits) - 1;
      std::uint32_t cells[kLanes], all = 0;
      for (std::size_t j = 0; j < lanes; ++j) {
        cells[j] = e.cell[((column[j] >> shift) - base) & mask];
        all |= cells[j];
      }
      if (all & kNoCell) return false;
      if (all & kEscapeCell)
        for (std::size_t j = lanes; j-- > 0;)
          if (cells[j] & kEscapeCell) *--sink->escapes = std::uint16_t(column[j] >> shift & mask);
      std::uint16_t* words = sink->words;
      for (std::size_t j = lanes; j-- > 0;) {
        const std::uint32_t x = x_[j];
        // All ones where the state must give off a word. Written at any rate: there is room, since
        // this number's own is not taken yet.
        const std::uint32_t full = 0u - std::uint32_t(x >> 22 >= (cells[j] & kFreqMask));
        words[-1] = std::uint16_t(x);
        words += std::int32_t(full);
        x_[j] = x >> (full & 16);
      }
      sink->words = words;
      for (std::size_t j = 0; j < lanes; ++j) {
        const std::uint32_t x = x_[j], cell = cells[j], freq = cell & kFreqMask;
        // x / freq, exactly: x < 2^22 freq, and reciprocal = ceil(2^42 / freq) with freq <= 2^10.
        const auto q = std::uint32_t(x * e.reciprocal[cell >> kSymbolAt & (kBuckets - 1)] >> 42);
        const std::uint32_t start = cell >> kStartAt & (kTotal - 1);
        x_[j] = q << kProbBits | e.slot[start + (x - q * freq)];
      }
      return true;
    }

   private:
    std::uint32_t x_[kLanes] = {};
  };

  template <typename T, int M>
  static void merge(const Tile<T>& tile, std::size_t token, std::size_t count, const T* base,
                    const std::uint8_t* mantissas, T* corner, std::ptrdiff_t stride,
                    std::size_t width) {
    constexpr int R = M % 8, B = M / 8;
    for (std::size_t o = 0; o < count; o += 8, mantissas += rows_of_octet(M) * kStrip) {
      T numbers[8][kStrip];
      for (int w = 0; w < Tile<T>::kWords; ++w)
        for (int i = 0; i < 8; ++i)
          std::memcpy(&numbers[i][w * Tile<T>::kInWord], &tile.word[w][token + o + std::size_t(i)],
                      4);
      std::uint8_t fields[8][kStrip];
      unpack<R>(mantissas + 8 * B * kStrip, fields);
      for (std::size_t i = 0; i < least(8, count - o); ++i, corner += stride) {
        const std::uint8_t* low = mantissas + i * kStrip;
        T row[kStrip];
        for (int c = 0; c < kStrip; ++c) {
          std::uint32_t m = std::uint32_t(fields[i][c]) << 8 * B;
          for (int j = 0; j < B; ++j) m |= std::uint32_t(low[8 * j * kStrip + c]) << 8 * j;
          row[c] = T(T(numbers[i][c] + base[c]) | m);
        }
        std::memcpy(corner, row, width == kStrip ? sizeof row : width * sizeof(T));
      }
    }
  }

  template <typename T>
  static void columns(const T (*rows)[kStrip], std::size_t token, Tile<T>& tile) {
    for (int w = 0; w < Tile<T>::kWords; ++w)
      for (int i = 0; i < 16; ++i)
        std::memcpy(&tile.word[w][token + std::size_t(i)], &rows[i][w * Tile<T>::kInWord], 4);
  }

  static void spread(const std::uint8_t* rows, std::size_t count, std::uint64_t live,
                     std::size_t live_count, std::uint8_t* out) {
    for (std::size_t i = 0; i < count; ++i, out += kStrip, rows += live_count) {
      std::memset(out, 0, kStrip);
      std::size_t k = 0;
      for (std::uint64_t left = live; left; left &= left - 1)
        out[__builtin_ctzll(left)] = rows[k++];
    }
  }

  static void collect(const std::uint8_t* row, std::uint64_t live, std::size_t, std::uint8_t* out) {
    for (; live; live &= live - 1) *out++ = row[__builtin_ctzll(live)];
  }
};

}  // namespace
}  // namespace kvzip::channel
