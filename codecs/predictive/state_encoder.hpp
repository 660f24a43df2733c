// rANS over intervals, last first.
#pragma once

#include <algorithm>

#include "predictive/vectors.hpp"

namespace kvzip::predictive {
namespace {

inline void put(std::uint64_t& state, std::uint64_t from, std::uint64_t share,
                std::uint32_t** word) {
  std::uint64_t y = state;
  const bool full = y >= share << 39;
  (*word)[-1] = std::uint32_t(y);
  *word -= full;
  y = full ? y >> 32 : y;
  state = (y / share << kCdfBits) + y % share + from;
}

// The states of one lane of a stream, and the words that they give off, written downwards.
template <class Isa>
struct LaneEncoder : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::W;
  // Of the stream's tokens in the tile's first channel, and how far apart channels lie.
  const std::uint32_t *start, *size;
  std::size_t stride;
  std::size_t tokens;
  int spare;  // bits of a share that a number which follows an escape leaves
  std::uint32_t* word;
  alignas(64) std::uint64_t x[kStream];

  void channel(std::size_t place, typename Isa::States& states) {
    const std::uint32_t *const from = start + place * stride, *const share = size + place * stride;
    // Intervals come from memory, backwards.
    constexpr std::size_t kAhead = 12;
    if (place >= kAhead)
      for (const std::uint32_t* row : {from, share}) {
        __builtin_prefetch(row - kAhead * stride);
        __builtin_prefetch(row - kAhead * stride + kStream / 2);
      }
    // Of as many as vectors hold; those past the last token are other numbers' shares.
    constexpr std::uint64_t kAll = ~std::uint64_t(0) >> (64 - W);
    std::uint64_t no_escapes = kAll;
    for (std::size_t k = 0; k < kStream; k += W)
      no_escapes &= Isa::below(Base::all(0), Base::load(share + k));
    if (__builtin_expect(no_escapes != kAll, 0)) {
      states.store(x);
      with_escapes(from, share);
      states = typename Isa::States(x);
    } else {
      word = states.put(from, share, tokens, word);
    }
  }
  __attribute__((noinline)) void with_escapes(const std::uint32_t* from,
                                              const std::uint32_t* share) {
    for (std::size_t k = tokens; k-- > 0;)
      if (!share[k]) put(x[k], std::uint64_t(from[k]) << spare, std::uint64_t(1) << spare, &word);
    for (std::size_t k = tokens; k-- > 0;)
      share[k] ? put(x[k], from[k], share[k], &word) : put(x[k], kCdf - kEscape, kEscape, &word);
  }
  // Those of the channels whose pairs use this lane, last first.
  void channels(std::size_t count, std::size_t group, std::size_t lanes, std::size_t lane) {
    typename Isa::States states(x);
    for (std::size_t g = (count + group - 1) / group; g-- > 0;) {
      const std::size_t first = g * group, pairs = (std::min(group, count - first) + 1) / 2;
      if (pairs <= lane) continue;
      for (std::size_t p = lane + (pairs - 1 - lane) / lanes * lanes;; p -= lanes) {
        if (first + 2 * p + 1 < count) channel(first + 2 * p + 1, states);
        channel(first + 2 * p, states);
        if (p == lane) break;
      }
    }
    states.store(x);
  }
};

// For instruction sets that divide no vectors of 64-bit numbers: one state after the other; for Isa
// to derive from.
struct OneByOne {
  struct States {
    std::uint64_t* x;

    explicit States(std::uint64_t* of) : x(of) {}
    void store(std::uint64_t*) const {}
    std::uint32_t* put(const std::uint32_t* from, const std::uint32_t* share, std::size_t tokens,
                       std::uint32_t* word) {
      for (std::size_t k = tokens; k-- > 0;) predictive::put(x[k], from[k], share[k], &word);
      return word;
    }
  };
};

// The kernel `encode` (kernels.hpp).
template <class Isa>
std::size_t encode(const Part& part, NumberFormat format, std::size_t group, std::size_t lanes,
                   const std::uint32_t* at, const Tile* tile, std::size_t tiles,
                   Intervals intervals, std::uint64_t* state, std::uint16_t* counts,
                   std::uint32_t* words_end) {
  const std::size_t channels = part.channels();
  LaneEncoder<Isa> encoder;
  encoder.spare = kCdfBits - format.bits();
  encoder.word = words_end;
  for (std::size_t i = tiles; i-- > 0;) {
    const Tile& t = tile[i];
    encoder.stride = t.count;
    for (std::size_t half = t.streams(); half-- > 0;) {
      const std::size_t first = half * kStream;
      encoder.tokens = std::min<std::size_t>(kStream, t.count - first);
      encoder.start = intervals.start + t.start * channels + first;
      encoder.size = intervals.size + t.start * channels + first;
      const std::uint32_t* const token = at + t.start + first;
      for (std::size_t lane = lanes; lane-- > 0;) {
        const std::uint32_t* const begin = encoder.word;
        for (std::size_t k = 0; k < encoder.tokens; ++k)
          encoder.x[k] = state[token[k] * lanes + lane];
        encoder.channels(channels, group, lanes, lane);
        for (std::size_t k = 0; k < encoder.tokens; ++k)
          state[token[k] * lanes + lane] = encoder.x[k];
        counts[(t.stream + half) * lanes + lane] = std::uint16_t(begin - encoder.word);
      }
    }
  }
  return std::size_t(words_end - encoder.word);
}

}  // namespace
}  // namespace kvzip::predictive
