// Decoding a stream, for any instruction set. What is done number by number is the instruction
// set's: `Isa` (kernels_*.cpp) has
//   Decoded  the values of a tile; `kWhole`: whether escapes can be put there, or only into place
//   Lanes    the states of a group's lanes, and `strip` for the channels of a tile
//   merge    up to 16 tokens of a tile, turned to rows, with the bases and mantissas, into place
//   spread   bytes to the channels that are not constant
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

  // To be called before each step with where words are read now; where to read on, or none when a
  // step has read more than there was.
  const std::uint8_t* ready(const std::uint8_t* from) {
    return __builtin_expect(end_ - from >= kReach, 1) ? from : copied(from);
  }
  bool all_read() const { return at == end_; }

 private:
  __attribute__((noinline)) const std::uint8_t* copied(const std::uint8_t* from) {
    if (end_ < from) return nullptr;
    if (!copied_) {
      const auto rest = std::size_t(end_ - from);
      std::memset(copy_, 0, sizeof copy_);
      std::memcpy(copy_, from, rest);
      from = copy_;
      end_ = copy_ + rest;
      copied_ = true;
    }
    return from;
  }
  static constexpr std::ptrdiff_t kReach = 2 * kLanes + 64;
  const std::uint8_t* end_;
  bool copied_ = false;
  std::uint8_t copy_[2 * kReach];
};

inline std::uint64_t first_ones(std::size_t n) {
  return n < 64 ? (std::uint64_t(1) << n) - 1 : ~std::uint64_t(0);
}

// What the steps of one strip work on, and which lanes of which channels were escapes.
template <typename T, class Decoded = Tile<T>>
struct StripWork {
  StripWork(const Tables& tables, const Channel* first, std::uint64_t live_channels,
            const Strip& strip, Words* next_words, Decoded* to)
      : decoders(tables.decoders),
        channels(first),
        live(live_channels),
        width(strip.width),
        words(next_words),
        tile(to),
        tokens(strip.lanes) {}

  const Decoder* decoders;
  const Channel* channels;
  std::uint64_t live;
  std::size_t width;
  Words* words;
  Decoded* tile;
  std::size_t tokens;
  // What the merge will touch comes from memory while the values are decoded.
  T* corner;
  std::ptrdiff_t token_stride;
  const std::uint8_t* mantissas;

  struct Escaped {
    std::size_t channel;
    std::uint64_t lanes[kLanes / 64];
  };
  Escaped escaped[kStrip];
  std::size_t escaped_count = 0;

  template <int M>
  __attribute__((always_inline)) void fetch(std::size_t c, const std::uint8_t* next_word) {
    constexpr std::size_t kRows = rows_of_octet(M);
    for (std::size_t j = 2 * c; j < least(2 * c + 2, tokens); ++j)
      for (std::size_t at = 0; at < kStrip; at += 64 / sizeof(T))
        __builtin_prefetch(corner + std::ptrdiff_t(j) * token_stride + at, 1);
    for (std::size_t k = 0; k < 2 * kRows; k += 8)
      __builtin_prefetch(mantissas + (c * (2 * kRows / 8 + (2 * kRows % 8 != 0)) + k / 8) * 64);
    __builtin_prefetch(next_word + 2048);
  }
};

// Channel by channel, for instruction sets whose lanes have a `step` for one.
template <typename T, int M, class Lanes>
bool each_channel(Lanes& lanes, StripWork<T>& work) {
  for (std::size_t c = 0; c < work.width; ++c) {
    work.template fetch<M>(c, work.words->at);
    if (!(work.live >> c & 1)) continue;
    work.words->at = work.words->ready(work.words->at);
    if (!work.words->at) return false;
    typename StripWork<T>::Escaped& escaped = work.escaped[work.escaped_count];
    escaped.channel = c;
    work.escaped_count +=
        lanes.step(work.decoders[work.channels[c].shape], &work.words->at, work.tile->column(c),
                   Tile<T>::template shift<M>(c), std::uint32_t(T(-1)) >> M,
                   c % Tile<T>::kInWord == 0, escaped.lanes);
  }
  return true;
}

// The states of all lanes, of which the first `lanes_` have tokens.
class StoredLanes {
 public:
  explicit StoredLanes(const std::uint32_t* states) { std::memcpy(x_, states, sizeof x_); }

  void store(std::uint32_t* states) const { std::memcpy(states, x_, sizeof x_); }
  // From now on the lanes from `lanes` on have no tokens, and keep their states.
  void limit(std::size_t lanes) { lanes_ = lanes; }

 protected:
  alignas(64) std::uint32_t x_[kLanes];
  std::size_t lanes_ = kLanes;
};

// The states that a stream begins with; false when one is none.
inline bool load_states(const Coded& coded, std::uint32_t (&states)[kLanes]) {
  const std::size_t lanes = coded.stream.lanes;
  const std::uint8_t* const with_top = coded.states + 3 * lanes;
  const std::uint8_t* top = coded.tops;
  bool good = true;
  for (std::uint32_t& x : states) x = kLow;
  for (std::size_t j = 0; j < lanes; ++j) {
    std::uint32_t x;
    std::memcpy(&x, coded.states + 3 * j, sizeof x);  // its last byte is the next one's or a bit's
    const std::uint32_t has_top = with_top[j / 8] >> j % 8 & 1;
    // The byte before is there at any rate, and no branch can be foreseen.
    top += has_top;
    x = (x & (kTop - 1)) | (std::uint32_t(top[-1]) << 24 & (0u - has_top));
    good &= x >= (has_top ? kTop : kLow);
    states[j] = x;
  }
  return good;
}

// The escapes still to come.
class Escapes {
 public:
  Escapes(const std::uint8_t* data, std::size_t count) : at_(data), end_(data + 2 * count) {}

  // Calls with each escape of a strip, in the order in which they were written: its channel, lane
  // and value. False when there are too few.
  template <class Work, typename Use>
  bool each(const Work& work, const Use& use) {
    for (std::size_t k = 0; k < work.escaped_count; ++k)
      for (int h = 0; h < kLanes / 64; ++h)
        for (std::uint64_t left = work.escaped[k].lanes[h]; left; left &= left - 1) {
          if (at_ == end_) return false;
          std::uint16_t value;
          std::memcpy(&value, at_, 2);
          at_ += 2;
          use(work.escaped[k].channel, 64 * std::size_t(h) + std::size_t(__builtin_ctzll(left)),
              value);
        }
    return true;
  }
  bool all_read() const { return at_ == end_; }

 private:
  const std::uint8_t *at_, *end_;
};

// The mantissas of a stream's last strip, whose end is what the states hold when all is decoded:
// `stored` bytes, then `carried` words of 16 bits. False when the states do not fit.
inline bool join_carried(const std::uint8_t* mantissas, std::size_t stored, std::size_t carried,
                         const std::uint32_t (&states)[kLanes], std::uint8_t* joined) {
  std::memcpy(joined, mantissas, stored);
  for (std::size_t j = 0; j < kLanes; ++j) {
    if (states[j] >> 16 != 1 || (j >= carried && states[j] != kLow)) return false;
    if (j < carried) std::memcpy(joined + stored + 2 * j, &states[j], 2);
  }
  return true;
}

// A strip's values with bases and mantissas into place. Returns what is behind the mantissas.
template <class Isa, typename T, int M, class Decoded>
inline const std::uint8_t* merge_strip(const Decoded& tile, const Strip& strip, std::uint64_t live,
                                       const T* base, const std::uint8_t* mantissas, T* corner,
                                       std::ptrdiff_t token_stride) {
  constexpr std::size_t kRows = rows_of_octet(M);
  alignas(64) std::uint8_t spread[2 * kRows * kStrip];
  const auto live_count = std::size_t(__builtin_popcountll(live));
  for (std::size_t o = 0; o < strip.lanes; o += 16) {
    const std::size_t tokens = least(16, strip.lanes - o), rows = (tokens + 7) / 8 * kRows;
    const std::uint8_t* at = mantissas;
    if (live_count < kStrip) {
      Isa::spread(mantissas, rows, live, live_count, spread);
      at = spread;
    }
    Isa::template merge<T, M>(tile, o, tokens, base, at, corner + std::ptrdiff_t(o) * token_stride,
                              token_stride, strip.width);
    mantissas += rows * live_count;
  }
  return mantissas;
}

template <class Isa, typename T, int M>
bool decode_stream(const Tables& tables, const Block<T>& block, const Coded& coded) {
  constexpr std::size_t kRows = rows_of_octet(M);
  alignas(64) std::uint32_t states[kLanes];
  if (!load_states(coded, states)) return false;
  typename Isa::Lanes lanes(states);

  Words words(coded.words, coded.word_count);
  Escapes escapes(coded.escapes, coded.escape_count);
  const std::uint8_t* mantissas = coded.mantissas;
  using Decoded = typename Isa::template Decoded<T>;
  Decoded tile;
  alignas(64) T base[kStrip];
  std::uint8_t last[kLanes / 8 * kRows * kStrip];

  const Strips strips(block.batch, tables.heads, block.tokens, tables.dim);
  const std::size_t end = coded.stream.first_strip + coded.stream.strips;
  for (std::size_t s = coded.stream.first_strip; s < end; ++s) {
    const Strip strip = strips[s];
    const Channel* channels = tables.channels + strip.head * tables.dim + strip.channel;
    if (strip.lanes < kLanes) lanes.limit(strip.lanes);
    const std::uint64_t live = strips.live(tables, strip);
    for (std::size_t c = 0; c < strip.width; ++c)
      base[c] = T(channels[c].constant ? channels[c].number : std::uint32_t(channels[c].base) << M);
    if (live != first_ones(kStrip)) std::memset(&tile, 0, sizeof tile);
    T* const corner = strip.corner(block);
    StripWork<T, Decoded> work(tables, channels, live, strip, &words, &tile);
    work.corner = corner;
    work.token_stride = block.token_stride;
    work.mantissas = mantissas;
    if (!lanes.template strip<T, M>(work)) return false;
    if constexpr (Decoded::kWhole)
      if (!escapes.each(work, [&](std::size_t channel, std::size_t lane, std::uint32_t value) {
            // The base is added to all of them later.
            tile.put(channel, lane, T(T(value << M) - base[channel]));
          }))
        return false;
    if (s + 1 == end) {
      lanes.store(states);
      const std::size_t carried = coded.stream.carried;
      const std::size_t bytes =
          (strip.lanes + 7) / 8 * kRows * std::size_t(__builtin_popcountll(live));
      if (!join_carried(mantissas, bytes - 2 * carried, carried, states, last)) return false;
      mantissas = last;
    }
    mantissas =
        merge_strip<Isa, T, M>(tile, strip, live, base, mantissas, corner, block.token_stride);
    if constexpr (!Decoded::kWhole)
      if (!escapes.each(work, [&](std::size_t channel, std::size_t lane, std::uint32_t value) {
            // Its mantissa is there already.
            T& number = corner[std::ptrdiff_t(lane) * block.token_stride + std::ptrdiff_t(channel)];
            number = T(value << M | (number & ((std::uint32_t(1) << M) - 1)));
          }))
        return false;
  }
  return words.all_read() && escapes.all_read();
}

}  // namespace
}  // namespace kvzip::channel
