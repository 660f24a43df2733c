// What becomes of a channel's numbers once it is known where they are expected: an
// IntervalRecorder notes the intervals of numbers that are known, a NumberDecoder reads numbers.
// Both have
//   begin, end  called before and after a tile; `end` tells whether all fits
//   code        takes a channel of a tile
#pragma once

#include <algorithm>
#include <cstring>

#include "predictive/density.hpp"

namespace kvzip::predictive {
namespace {

// A channel's numbers: `count` of them, room for kTile.
template <typename T>
struct ChannelNumbers {
  T* number;
  std::size_t count;
};
// What is expected of each token's number (Density): `centre` and `m`, [kTile].
struct Expected {
  const std::int32_t *centre, *m;
};
// What the number turned out to be: its value as fixed point and its |z|, [kTile].
struct Found {
  std::int32_t *value, *z;
};

template <class Isa, typename T>
struct IntervalRecorder : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::load, Base::store, Base::W, Base::widened;
  using typename Base::I;

  Intervals at;
  std::uint32_t* counts;
  std::int32_t half;  // numbers of each sign

  IntervalRecorder(const Intervals& to, std::uint32_t* cell_counts, std::int32_t numbers)
      : at(to), counts(cell_counts), half(numbers) {}

  void begin(const Tokens&, const Tile&, std::size_t) {}
  bool end(const Tokens&, const Tile&, std::size_t) { return true; }

  void code(std::size_t, const Density<Isa>& density, ChannelNumbers<T> numbers, Expected expected,
            Found found) {
    for (std::size_t t = 0; t < numbers.count; t += W) {
      const I bits = widened(numbers.number + t);
      const I k = (bits & half) != 0 ? 2 * half - 1 - bits : bits + half;
      const auto [low, size, value, z] =
          density.interval(k, load(expected.centre + t), load(expected.m + t));
      store(at.start + t, size > 0 ? low : k);
      store(at.size + t, size);
      store(found.value + t, value);
      store(found.z + t, z);
    }
    at.start += numbers.count;
    at.size += numbers.count;
  }
};

template <class Isa, typename T>
struct NumberDecoder : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::all, Base::any, Base::lanes, Base::min_of, Base::load, Base::max_of, Base::store,
      Base::store_narrow, Base::W;
  using typename Base::I, typename Base::U;
  using Interval = typename Density<Isa>::Interval;

  const Coded& coded;
  std::int32_t half;  // numbers of each sign
  static constexpr std::uint32_t* counts = nullptr;
  bool ran_out = false;
  // Of the tile that is read: states, and each lane's streams.
  alignas(64) std::uint64_t state[kMostLanes][kTile];
  const std::uint8_t* word[kMostLanes][kStreams];
  const std::uint8_t* last[kMostLanes][kStreams];

  NumberDecoder(const Coded& from, std::int32_t numbers) : coded(from), half(numbers) {}

  void begin(const Tokens& tokens, const Tile& tile, std::size_t lane_count) {
    for (std::size_t t = 0; t < tile.count; ++t)
      for (std::size_t l = 0; l < lane_count; ++l)
        state[l][t] = coded.state[tokens.at[tile.start + t] * lane_count + l];
    for (std::size_t l = 0; l < lane_count; ++l)
      std::fill(state[l] + tile.count, state[l] + kTile, kLow);
    for (std::size_t h = 0; h < tile.streams(); ++h)
      for (std::size_t l = 0; l < lane_count; ++l) {
        word[l][h] = coded.word[(tile.stream + h) * lane_count + l];
        last[l][h] = coded.end[(tile.stream + h) * lane_count + l];
      }
  }
  // Whether all words were taken and no more.
  bool end(const Tokens& tokens, const Tile& tile, std::size_t lane_count) {
    for (std::size_t t = 0; t < tile.count; ++t)
      for (std::size_t l = 0; l < lane_count; ++l)
        coded.state[tokens.at[tile.start + t] * lane_count + l] = state[l][t];
    bool good = !ran_out;
    for (std::size_t h = 0; h < tile.streams(); ++h)
      for (std::size_t l = 0; l < lane_count; ++l) good = good && word[l][h] == last[l][h];
    return good;
  }

  // What a vector goes through is a long chain, so one vector begins before the other is done: no
  // loop needs what it has done for the vector before, but for the last.
  void code(std::size_t lane, const Density<Isa>& density, ChannelNumbers<T> numbers,
            Expected expected, Found found) {
    alignas(64) std::int32_t targets[kTile], guesses[kTile], sizes[kTile], rests[kTile];
    std::uint64_t* const x = state[lane];
    const std::size_t n = numbers.count;
    for (std::size_t t = 0; t < n; t += W) {
      const I target = Isa::low_halves(x + t) & std::int32_t(kCdf - 1);
      const I c = load(expected.centre + t);
      store(targets + t, target);
      store(guesses + t, density.guess(target, c, load(expected.m + t)));
    }
    std::uint32_t escapes[kTile / W] = {}, any_escape = 0;
    for (std::size_t t = 0; t < n; t += W) {
      const std::size_t used = std::min<std::size_t>(W, n - t);
      const I target = load(targets + t), c = load(expected.centre + t), m = load(expected.m + t);
      I k = load(guesses + t);
      Interval in = density.interval(k, c, m);
      const I wrong = (lanes() < std::int32_t(used)) & outside(target, in);
      if (__builtin_expect(any(wrong), 0))
        any_escape |= escapes[t / W] = correct(density, target, wrong, c, m, &k, &in);
      store(sizes + t, in.size);
      store(rests + t, target - in.low);
      store(found.value + t, in.value);
      store(found.z + t, in.z);
      const I bits = k >= half ? k - half : 2 * half - 1 - k;
      store_narrow(numbers.number + t, bits);
    }
    advance(lane, n, sizes, rests);
    if (__builtin_expect(any_escape != 0, 0))
      read_escapes(escapes, lane, density, numbers, expected, found);
  }

 private:
  static I outside(I target, const Interval& in) { return (U)(target - in.low) >= (U)in.size; }

  // The states of a lane, from their numbers' intervals.
  void advance(std::size_t lane, std::size_t n, const std::int32_t* sizes,
               const std::int32_t* rests) {
    std::uint64_t* const x = state[lane];
    for (std::size_t t = 0; t < n; t += W) {
      const std::uint8_t*& next = word[lane][t / kStream];
      const std::uint8_t* const stop = last[lane][t / kStream];
      if (std::size_t(stop - next) >= 4 * W && n - t >= W) {
        next = Isa::advance(x + t, (U)load(sizes + t), (U)load(rests + t), next);
        continue;
      }
      for (std::size_t i = t; i < t + std::min<std::size_t>(W, n - t); ++i)
        advance_one(x[i], std::uint32_t(sizes[i]), std::uint32_t(rests[i]), &next, stop);
    }
  }
  void advance_one(std::uint64_t& x, std::uint32_t size, std::uint32_t rest,
                   const std::uint8_t** next, const std::uint8_t* stop) {
    x = std::uint64_t(size) * (x >> kCdfBits) + rest;
    if (x >= kLow) return;
    std::uint32_t found = 0;
    if (*next == stop) {
      ran_out = true;
    } else {
      std::memcpy(&found, *next, 4);
      *next += 4;
    }
    x = x << 32 | found;
  }

  // Numbers that follow an escape as they are: those whose bit is set in `escapes`, a word for each
  // vector.
  void read_escapes(const std::uint32_t* escapes, std::size_t lane, const Density<Isa>& density,
                    ChannelNumbers<T> numbers, Expected expected, Found found) {
    std::uint64_t* const x = state[lane];
    const int spare = kCdfBits - density.bits;
    for (std::size_t t = 0; t < numbers.count; ++t) {
      if (!(escapes[t / W] >> t % W & 1)) continue;
      const auto target = std::uint32_t(x[t] & (kCdf - 1));
      advance_one(x[t], 1u << spare, target & ((1u << spare) - 1), &word[lane][t / kStream],
                  last[lane][t / kStream]);
      const auto k = std::int32_t(target >> spare);
      const Interval in = density.interval(all(k), all(expected.centre[t]), all(expected.m[t]));
      found.value[t] = in.value[0];
      found.z[t] = in.z[0];
      numbers.number[t] = T(k >= half ? k - half : 2 * half - 1 - k);
    }
  }

  // The numbers and their intervals, where those in `k` are `wrong` ones. Returns which are
  // escapes: their interval is that of the escape.
  __attribute__((noinline)) static std::uint32_t correct(const Density<Isa>& density, I target,
                                                         I wrong, I centre, I m, I* k,
                                                         Interval* in) {
    const I escape = wrong & (target >= std::int32_t(kCdf - kEscape));
    wrong = wrong & ~escape;
    // Mostly it is the one beside.
    const I beside = target < in->low ? *k - 1 : *k + 1;
    *k = wrong ? max_of(min_of(beside, all(density.numbers - 1)), all(0)) : *k;
    *in = density.interval(*k, centre, m);
    wrong = wrong & outside(target, *in);
    if (any(wrong)) {
      for (int i = 0; i < W; ++i)
        if (wrong[i]) (*k)[i] = density.search(target[i], centre[i], m[i]);
      *in = density.interval(*k, centre, m);
    }
    std::uint32_t which = 0;
    if (any(escape)) {
      in->low = escape ? all(std::int32_t(kCdf - kEscape)) : in->low;
      in->size = escape ? all(std::int32_t(kEscape)) : in->size;
      for (int i = 0; i < W; ++i) which |= std::uint32_t(escape[i] & 1) << i;
    }
    return which;
  }
};

}  // namespace
}  // namespace kvzip::predictive
