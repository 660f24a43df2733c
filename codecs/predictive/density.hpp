// A channel's numbers as fixed point, and how they are distributed about where they are expected.
#pragma once

#include <algorithm>
#include <cstring>

#include "predictive/vectors.hpp"

namespace kvzip::predictive {
namespace {

// A format's numbers: their bits without the sign, and the sign, 0 or -1.
template <class I>
struct Signed {
  I bits, sign;
};

// The numbers of a format as fixed-point values of one channel. Floats here are exact: bits put
// together, times a power of two, cut off at a whole number.
template <class Isa>
struct NumberGrid : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::all, Base::as_bits, Base::as_float, Base::min_of, Base::max_of, Base::to_int;
  using typename Base::F, typename Base::I;

  std::int32_t half;  // numbers of each sign
  int exponent_bits, mantissa_bits, exponent_bias;
  float unit, units;  // 2^unit and how many of it make 1

  NumberGrid(NumberFormat format, int unit_exponent)
      : half(1 << (format.bits() - 1)),
        exponent_bits(format.exponent_bits),
        mantissa_bits(format.mantissa_bits),
        exponent_bias((1 << (format.exponent_bits - 1)) - 1),
        unit(scale(unit_exponent)),
        units(scale(-unit_exponent)) {}

  static float scale(int exponent) {
    const std::int32_t bits = (std::min(std::max(exponent, -126), 127) + 127) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  // The fixed-point value of a number's bits without its sign, with zeros below them as a float32
  // has. Infinities and NaNs go on where the finite numbers end, and are cut off with them.
  I magnitude(I bits) const {
    F f;
    if (exponent_bias == 127) {
      f = as_float(bits);
    } else {
      const std::int32_t rebias = (127 - exponent_bias) << 23, one = rebias + (1 << 23);
      const F subnormal = as_float(bits + one) - as_float(all(one));
      f = bits < (1 << 23) ? subnormal : as_float(bits + rebias);
    }
    return to_int(Isa::less(f * units, F{} + float(kClamp)));
  }
  // Numbers counted in their own order, from 0 up.
  Signed<I> number(I place) const {
    const I s = place - half, sign = s >> 31;
    return {s ^ sign, sign};
  }
  I place(Signed<I> n) const { return half + (n.bits ^ n.sign); }
  // As they stand in memory.
  I stored(Signed<I> n) const { return n.bits | (n.sign & half); }
  Signed<I> read(I stored) const {
    return {stored & (half - 1), stored << (31 - exponent_bits - mantissa_bits) >> 31};
  }
  // The boundary below number k: the middle between it and the one before it, which has one bit
  // more, away from 0 to the next whole number. So there is room for 0, and none for what is next
  // to it.
  I boundary(I k) const {
    const I s = k - half, sign = s >> 31, inner = (s ^ sign) - 1 - sign;
    const int spare = 23 - mantissa_bits;
    const I found = (magnitude((inner << spare) + (1 << (spare - 1))) + 1) & (inner >= 0);
    return (found ^ sign) - sign;
  }
  // About the number next to a value; only where a search begins, so it may be off.
  Signed<I> near(F v) const {
    const I bits = as_bits(v * unit) & 0x7fffffff;
    const int spare = 23 - mantissa_bits;
    I m = (bits - (((127 - exponent_bias) << 23) - (1 << (spare - 1)))) >> spare;
    if (exponent_bias != 127) {  // subnormals are no float32's
      const F x = as_float(bits) * scale(exponent_bias - 1 + mantissa_bits) + 0.5f;
      m = max_of(m < (1 << mantissa_bits) ? to_int(x) : m, all(0));
    }
    return {min_of(m, all(half - 1)), as_bits(v) >> 31};
  }
};

// How numbers of one channel are spread about where they are expected. Of each token, `centre` is
// where, and `m` how narrowly: 2^13 z for each unit of twice the deviation.
template <class Isa>
struct Density : NumberGrid<Isa> {
  using Base = NumberGrid<Isa>;
  using Base::all, Base::as_bits, Base::as_float, Base::boundary, Base::half, Base::lanes,
      Base::magnitude, Base::mantissa_bits, Base::max_of, Base::min_of, Base::near,
      Base::shift_right, Base::to_float, Base::to_int, Base::W;
  using typename Base::F, typename Base::I;

  typename Isa::Table table;
  typename Isa::Search search_from;
  std::int32_t numbers;
  int bits;

  Density(const Densities& d, std::size_t shape, NumberFormat format, int unit)
      : Base(format, unit),
        table(d, shape),
        search_from(d, shape),
        numbers(1 << format.bits()),
        bits(format.bits()) {}

  static constexpr std::int32_t kFarthest = (1 << (kZBits + 7)) - (1 << (kZBits - 1)) - 1;
  static_assert(kFirstCell == (127 + kZBits - 1) << 3);

  // Of half the distance.
  static I z_of(I d, I m) { return Isa::z(min_of(Isa::abs(d), all(1 << 26)), m, kFarthest); }
  // Exact: a float32 holds z + 2^15, which is below 2^23.
  static I placed(I z) { return as_bits(to_float(z + (1 << (kZBits - 1)))); }
  static I cell_of(I z) { return (placed(z) >> 20) - kFirstCell; }

  // Most numbers lie in the first cells, of which some instruction sets find the shares sooner.
  static constexpr bool kSomeNear = Isa::Table::kNear < kCells;
  static constexpr std::int32_t kNear =
      (1 << (kZBits - 1 + Isa::Table::kNear / 8)) - (1 << (kZBits - 1));

  // Share below the boundary that lies d from the centre, less kHalf. `some_near`: z is below
  // kNear.
  template <bool some_near>
  I share(I d, I z) const {
    const I bits = placed(z);
    I from, rise;
    if constexpr (some_near) table.near(bits >> 20, &from, &rise);
    else table.at(bits >> 20, &from, &rise);
    const I g = from + shift_right(rise * ((bits >> 8) & 0xfff), 12);
    const I sign = d >> 31;
    return (g ^ sign) - sign;
  }

  // About the number whose interval holds a target; how it comes to that has no bearing on the
  // format.
  template <bool some_near = false>
  Signed<I> guess(I target, I centre, I m) const {
    const I c = target - kHalf, g = Isa::abs(c);
    const I tail = as_bits(to_float(max_of(kHalf - g, all(1 << 7))));
    const I cell = to_int(
        search_from.at(Base::shift_right(tail, 22), as_float((tail & 0x3fffff) | (127 << 23))));
    // Where the next cell begins, this one goes on much the same.
    I from, rise;
    if constexpr (some_near) table.near(cell, &from, &rise);
    else table.at(cell, &from, &rise);
    const F inside =
        (to_float(g - from) + 0.5f) * (float(1 << 20) * Isa::reciprocal(to_float(rise | 1)));
    const F z = as_float((cell << 20) + to_int(inside)) - (float(1 << (kZBits - 1)) - 0.5f);
    const F away = z * (float(1 << (28 - kZBits)) * Isa::reciprocal(to_float(m)));
    const F v = to_float(centre) + as_float(as_bits(away) ^ (c & std::int32_t(0x80000000)));
    // Boundaries were moved away from 0, by half a unit on average.
    return near(v - as_float(as_bits(F{} + 0.5f) | (as_bits(v) & std::int32_t(0x80000000))));
  }

  // A number's share of [0, 2^24), from where on and how much; its fixed-point value; the mean |z|
  // of its boundaries, and the greater one.
  struct Interval {
    I low, size, value, z, farther;
  };
  // All of it is the same with signs turned, so a number counts as positive here, and its centre is
  // turned with it. With `some_near` intervals whose `farther` is kNear or more come out wrong.
  template <bool some_near = false>
  __attribute__((always_inline)) Interval interval(Signed<I> n, I centre, I m) const {
    const int spare = 23 - mantissa_bits;
    const I bits = n.bits << spare, c = ((centre ^ n.sign) - n.sign) - 1;
    const I inner = n.bits > 0 ? magnitude(bits - (1 << (spare - 1))) : all(-1),
            outer = magnitude(bits + (1 << (spare - 1))), value = magnitude(bits);
    const I d0 = inner - c, d1 = outer - c;
    const I z0 = z_of(d0, m), z1 = z_of(d1, m);
    const I near = share<some_near>(d0, z0),
            far = n.bits == half - 1 ? all(kHalf) : share<some_near>(d1, z1);
    const I first = n.sign < 0 ? -far : near;
    return {kHalf + first, far - near, (value ^ n.sign) - n.sign, (z0 + z1) >> 1, max_of(z0, z1)};
  }

  __attribute__((noinline)) Interval any_interval(Signed<I> n, I centre, I m) const {
    return interval<false>(n, centre, m);
  }
  // Calls `of(t, interval)` for each vector of so many tokens, `interval` being what tells
  // intervals; it returns the intervals' `farther`. Where a number is far out, which is seldom, it
  // is called again: by then all others are done, so that none is kept in memory meanwhile.
  template <class Of>
  void intervals(std::size_t tokens, const Of& of) const {
    std::uint64_t far = 0;
    for (std::size_t t = 0; t < tokens; t += W) {
      const I farther =
          of(t, [this](Signed<I> n, I centre, I m) { return interval<kSomeNear>(n, centre, m); });
      if (kSomeNear) far |= Isa::below(all(kNear - 1), farther) << t;
    }
    while (__builtin_expect(far != 0, 0)) {
      const std::size_t t = std::size_t(__builtin_ctzll(far)) / W * W;
      of(t, [this](Signed<I> n, I centre, I m) { return any_interval(n, centre, m); });
      Base::set(&far, t, 0);
    }
  }

  // The number whose interval holds a target, by halving what is left, W ways at once.
  std::int32_t search(std::int32_t target, std::int32_t centre, std::int32_t m) const {
    std::int32_t low = 0, end = numbers;
    while (end - low > 1) {
      const std::int32_t step = (end - low + W - 1) / W;
      const I k = min_of(low + step * lanes(), all(end - 1));
      const I d = boundary(k) - centre;
      const I at = kHalf + share<false>(d, z_of(d, all(m)));
      const I below = ((k == 0 ? all(0) : at) <= target) & (k < end);
      std::int32_t last = 0;
      for (int i = 0; i < W; ++i) last = below[i] ? k[i] : last;
      end = std::min(end, last + step);
      low = last;
    }
    return low;
  }
};

}  // namespace
}  // namespace kvzip::predictive
