// What becomes of a channel's numbers once it is known where they are expected: an
// IntervalRecorder notes the intervals of numbers that are known, a NumberDecoder reads numbers.
// Both have
//   begin, end  called before and after a tile; `end` tells whether all fits
//   code        takes a channel of a tile; tells which numbers are escapes, a bit each
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "predictive/code_length.hpp"
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
  double bits = 0;  // of the tiles that are done

  IntervalRecorder(const Intervals& to, std::uint32_t* cell_counts, NumberFormat format)
      : at(to),
        counts(cell_counts),
        escape_(std::ldexp(double(kEscape), -kCdfBits - format.bits())) {}

  void begin(const Tokens&, const Tile&, std::size_t) { sizes_ = at.size; }
  bool end(const Tokens&, const Tile&, std::size_t) {
    bits += code_length(sizes_, std::size_t(at.size - sizes_), escape_);  // still in a cache
    return true;
  }

  std::uint64_t code(std::size_t, const Density<Isa>& density, ChannelNumbers<T> numbers,
                     Expected expected, Found found) {
    std::uint64_t shares = 0;
    density.intervals(numbers.count, [&](std::size_t t, auto interval) {
      const auto number = density.read(widened(numbers.number + t));
      const auto in = interval(number, load(expected.centre + t), load(expected.m + t));
      store(at.start + t, in.size > 0 ? in.low : density.place(number));
      store(at.size + t, in.size);
      store(found.value + t, in.value);
      store(found.z + t, in.z);
      Base::set(&shares, t, Isa::below(Base::all(0), in.size));
      return in.farther;
    });
    at.start += numbers.count;
    at.size += numbers.count;
    return ~shares & ~std::uint64_t(0) >> (kTile - numbers.count);
  }
  // Token t's number in the channel just coded is an escape, whatever its share.
  void escape(std::size_t t, const Density<Isa>& density, ChannelNumbers<T> numbers,
              Expected expected, Found found) {
    const auto number = density.read(Base::all(std::int32_t(numbers.number[t])));
    const auto in =
        density.any_interval(number, Base::all(expected.centre[t]), Base::all(expected.m[t]));
    at.start[std::ptrdiff_t(t) - std::ptrdiff_t(numbers.count)] =
        std::uint32_t(density.place(number)[0]);
    at.size[std::ptrdiff_t(t) - std::ptrdiff_t(numbers.count)] = 0;
    found.value[t] = in.value[0];
    found.z[t] = in.z[0];
  }

 private:
  double escape_;                 // the share of a number that follows an escape
  const std::uint32_t* sizes_{};  // of the tile's numbers
};

template <class Isa, typename T>
struct NumberDecoder : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::all, Base::load, Base::store, Base::store_narrow, Base::W;
  using typename Base::I, typename Base::U;
  using Interval = typename Density<Isa>::Interval;
  static constexpr bool kSomeNear = Density<Isa>::kSomeNear;
  // Bytes of a stream's words that are fetched before they are needed. Streams are read so slowly
  // that the processor does not foresee what comes next.
  static constexpr std::size_t kWordsAhead = 384;

  const Coded& coded;
  static constexpr std::uint32_t* counts = nullptr;
  bool ran_out = false;
  // Of the tile that is read: states, and each lane's streams.
  alignas(64) std::uint64_t state[kMostLanes][kTile];
  const std::uint8_t* word[kMostLanes][kStreams];
  const std::uint8_t* last[kMostLanes][kStreams];

  explicit NumberDecoder(const Coded& from) : coded(from) {}

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
        for (std::size_t at = 0; at < kWordsAhead; at += 64) __builtin_prefetch(word[l][h] + at);
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
  std::uint64_t code(std::size_t lane, const Density<Isa>& density, ChannelNumbers<T> numbers,
                     Expected expected, Found found) {
    alignas(64) std::int32_t targets[kTile], guesses[kTile], sizes[kTile], rests[kTile];
    std::uint64_t* const x = state[lane];
    const std::size_t n = numbers.count;
    for (std::size_t t = 0; t < n; t += W) {
      const I target = Isa::low_halves(x + t) & std::int32_t(kCdf - 1);
      const I c = load(expected.centre + t);
      store(targets + t, target);
      const auto number = density.template guess<kSomeNear>(target, c, load(expected.m + t));
      store(guesses + t, density.stored(number));
    }
    std::uint64_t right = 0;
    density.intervals(n, [&](std::size_t t, auto interval) {
      const I target = load(targets + t), stored = load(guesses + t);
      const Interval in =
          interval(density.read(stored), load(expected.centre + t), load(expected.m + t));
      store(sizes + t, in.size);
      store(rests + t, target - in.low);
      store(found.value + t, in.value);
      store(found.z + t, in.z);
      store_narrow(numbers.number + t, stored);
      Base::set(&right, t, Isa::below(target - in.low, in.size));
      return in.farther;
    });
    const std::uint64_t wrong = ~right & ~std::uint64_t(0) >> (kTile - n);
    std::uint64_t escapes = 0;
    if (__builtin_expect(wrong != 0, 0))
      escapes = correct(wrong, density, numbers, expected, found, {targets, guesses, sizes, rests});
    advance(lane, n, sizes, rests);
    if (__builtin_expect(escapes != 0, 0))
      read_escapes(escapes, lane, density, numbers, expected, found);
    return escapes;
  }

 private:
  // What decoding a channel goes by, [kTile] each: targets, the numbers that were guessed, the
  // sizes of their intervals and where in these the targets lie.
  struct Guessed {
    std::int32_t *target, *guess, *size, *rest;
  };

  // The states of a lane, from their numbers' intervals.
  void advance(std::size_t lane, std::size_t n, const std::int32_t* sizes,
               const std::int32_t* rests) {
    std::uint64_t* const x = state[lane];
    for (std::size_t t = 0; t < n; t += W) {
      const std::uint8_t*& next = word[lane][t / kStream];
      const std::uint8_t* const stop = last[lane][t / kStream];
      __builtin_prefetch(next + kWordsAhead);
      if (std::size_t(stop - next) >= 4 * W && n - t >= W) {
        next = Isa::advance(x + t, sizes + t, rests + t, next);
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

  // Numbers that follow an escape as they are: those whose bit is set in `escapes`.
  void read_escapes(std::uint64_t escapes, std::size_t lane, const Density<Isa>& density,
                    ChannelNumbers<T> numbers, Expected expected, Found found) {
    std::uint64_t* const x = state[lane];
    const int spare = kCdfBits - density.bits;
    for (; escapes; escapes &= escapes - 1) {
      const auto t = std::size_t(__builtin_ctzll(escapes));
      const auto target = std::uint32_t(x[t] & (kCdf - 1));
      advance_one(x[t], 1u << spare, target & ((1u << spare) - 1), &word[lane][t / kStream],
                  last[lane][t / kStream]);
      const auto k = std::int32_t(target >> spare);
      const auto number = density.number(all(k));
      const Interval in = density.any_interval(number, all(expected.centre[t]), all(expected.m[t]));
      found.value[t] = in.value[0];
      found.z[t] = in.z[0];
      numbers.number[t] = T(density.stored(number)[0]);
    }
  }

  // Numbers and intervals of the tokens whose bit is set in `wrong`, as what was guessed is not
  // theirs. Returns which are escapes: their interval is that of the escape.
  __attribute__((noinline)) std::uint64_t correct(std::uint64_t wrong, const Density<Isa>& density,
                                                  ChannelNumbers<T> numbers, Expected expected,
                                                  Found found, const Guessed& g) const {
    std::uint64_t escapes = 0;
    while (wrong) {
      // As many as fill a vector.
      std::size_t at[W], count = 0;
      alignas(64) std::int32_t targets[W] = {}, guesses[W] = {}, steps[W] = {}, centres[W] = {},
                               ms[W] = {};
      for (; wrong && count < W; wrong &= wrong - 1) {
        const auto t = std::size_t(__builtin_ctzll(wrong));
        const std::int32_t target = g.target[t];
        if (target >= std::int32_t(kCdf - kEscape)) {
          escapes |= std::uint64_t(1) << t;
          g.size[t] = kEscape;
          g.rest[t] = target - std::int32_t(kCdf - kEscape);
          continue;
        }
        at[count] = t;
        guesses[count] = g.guess[t];
        steps[count] = g.rest[t] < 0 ? -1 : 1;
        targets[count] = target;
        centres[count] = expected.centre[t];
        ms[count++] = expected.m[t];
      }
      if (!count) break;
      const I target = load(targets), c = load(centres), m = load(ms);
      const std::uint64_t used = (std::uint64_t(1) << count) - 1;
      // Mostly it is the one beside; or one that is far out.
      const auto a_number = [&](I k) {
        return Base::max_of(Base::min_of(k, all(density.numbers - 1)), all(0));
      };
      I k = a_number(density.place(density.read(load(guesses))) + load(steps));
      Interval in = density.any_interval(density.number(k), c, m);
      if (~Isa::below(target - in.low, in.size) & used) {
        const I right = (U)(target - in.low) < (U)in.size;
        k = right ? k : a_number(density.place(density.guess(target, c, m)));
        in = density.any_interval(density.number(k), c, m);
        if (std::uint64_t far = ~Isa::below(target - in.low, in.size) & used) {
          store(guesses, k);
          for (; far; far &= far - 1) {
            const int i = __builtin_ctzll(far);
            guesses[i] = density.search(targets[i], centres[i], ms[i]);
          }
          k = load(guesses);
          in = density.any_interval(density.number(k), c, m);
        }
      }
      const I stored = density.stored(density.number(k));
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t t = at[i];
        g.size[t] = in.size[int(i)];
        g.rest[t] = targets[i] - in.low[int(i)];
        found.value[t] = in.value[int(i)];
        found.z[t] = in.z[int(i)];
        numbers.number[t] = T(stored[int(i)]);
      }
    }
    return escapes;
  }
};

}  // namespace
}  // namespace kvzip::predictive
