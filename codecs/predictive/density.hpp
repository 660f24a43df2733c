// A channel's numbers as fixed point, and how they are distributed about where they are expected.
#pragma once

#include <algorithm>
#include <cstring>

#include "predictive/vectors.hpp"

namespace kvzip::predictive {
namespace {

// The numbers of a format, counted in their own order from 0 up, as fixed-point values of one
// channel. Floats here are exact: bits put together, times a power of two, cut off at a whole
// number.
template <class Isa>
struct NumberGrid : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::all, Base::as_bits, Base::as_float, Base::min_of, Base::max_of, Base::to_int;
  using typename Base::F, typename Base::I;

  std::int32_t half;  // numbers of each sign
  int mantissa_bits, exponent_bias;
  float unit, units;  // 2^unit and how many of it make 1

  NumberGrid(NumberFormat format, int unit_exponent)
      : half(1 << (format.bits() - 1)),
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
      f = as_float(min_of(bits, all(0x7f000000)));
    } else {
      const std::int32_t rebias = (127 - exponent_bias) << 23, one = rebias + (1 << 23);
      const F subnormal = as_float(bits + one) - as_float(all(one));
      f = bits < (1 << 23) ? subnormal : as_float(bits + rebias);
    }
    f = f * units;
    return to_int(f < float(kClamp) ? f : F{} + float(kClamp));
  }
  I value(I k) const {
    const I s = k - half, sign = s >> 31, m = s ^ sign;
    return (magnitude(m << (23 - mantissa_bits)) ^ sign) - sign;
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
  I near(F v) const {
    const I bits = as_bits(v * unit) & 0x7fffffff;
    const int spare = 23 - mantissa_bits;
    I m = (bits - ((127 - exponent_bias) << 23) + (1 << (spare - 1))) >> spare;
    if (exponent_bias != 127) {  // subnormals are no float32's
      const F x = as_float(bits) * scale(exponent_bias - 1 + mantissa_bits) + 0.5f;
      m = m < (1 << mantissa_bits) ? to_int(x) : m;
    }
    m = max_of(min_of(m, all(half - 1)), all(0));
    const I sign = as_bits(v) >> 31;
    return half + (m ^ sign);
  }
};

// How numbers of one channel are spread about where they are expected. Of each token, `centre` is
// where, and `m` how narrowly: 2^13 z for each unit of twice the deviation.
template <class Isa>
struct Density : NumberGrid<Isa> {
  using Base = NumberGrid<Isa>;
  using Base::all, Base::as_bits, Base::as_float, Base::boundary, Base::lanes, Base::min_of,
      Base::max_of, Base::near, Base::shift_right, Base::to_float, Base::to_int, Base::value,
      Base::W;
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
  static constexpr int kFirst = (127 + kZBits - 1) << 3;  // exponent and top bits of cell 0

  static I z_of(I d, I m) {
    const I a = (d ^ d >> 31) - (d >> 31);
    return Isa::z(min_of(a, all(1 << 27)), m, kFarthest);
  }
  // Exact: a float32 holds z + 2^13, which is below 2^21.
  static I placed(I z) { return as_bits(to_float(z + (1 << (kZBits - 1)))); }
  static I cell_of(I z) { return (placed(z) >> 20) - kFirst; }

  // Share below the boundary that lies d/2 from the centre.
  I share(I d, I z) const {
    const I bits = placed(z);
    I from, rise;
    table.at((bits >> 20) - kFirst, &from, &rise);
    const I g = from + shift_right(rise * ((bits >> 8) & 0xfff), all(12));
    const I sign = d >> 31;
    return kHalf + ((g ^ sign) - sign);
  }

  // About the number whose interval holds a target; how it comes to that has no bearing on the
  // format.
  I guess(I target, I centre, I m) const {
    const I c = min_of(target - kHalf, all(kHalf));
    const I sign = c >> 31, g = (c ^ sign) - sign;
    const I tail = as_bits(to_float(kHalf - g));
    const I step = max_of((tail >> 21) - ((127 + 7) << 2), all(0));
    F from, rise;
    search_from.at(step, &from, &rise);
    const F rest = to_float(tail & 0x1fffff) * (1.0f / (1 << 21));
    I place = max_of(min_of(to_int(from + rise * rest), all(kCells - 1)), all(0));
    I start, size;
    table.at(place, &start, &size);
    place = place + ((g < start) | ((g >= start + size) & 1));
    place = max_of(min_of(place, all(kCells - 1)), all(0));
    table.at(place, &start, &size);
    const F begin = as_float((place + kFirst) << 20);
    // What a step of a share is in values.
    const F scale = float(1 << (28 - kZBits)) / to_float(m);
    const F rate = (as_float((place + kFirst + 1) << 20) - begin) / to_float(size | 1) * scale;
    const F away = (begin - float(1 << (kZBits - 1))) * scale +
                   (to_float(g - start) + 0.5f) * rate + 0.5f * scale;
    const F v = to_float(centre) + as_float(as_bits(away) ^ (sign & std::int32_t(0x80000000)));
    // Boundaries were moved away from 0, by half a unit on average.
    return near(v - as_float(as_bits(F{} + 0.5f) | (as_bits(v) & std::int32_t(0x80000000))));
  }

  // A number's share of [0, 2^24), its fixed-point value and the mean |z| of its boundaries.
  struct Interval {
    I low, high, value, z;
  };
  Interval interval(I k, I centre, I m) const {
    const I d0 = 2 * (boundary(k) - centre), d1 = 2 * (boundary(k + 1) - centre);
    const I z0 = z_of(d0, m), z1 = z_of(d1, m);
    return {k == 0 ? all(0) : share(d0, z0), k == numbers - 1 ? all(2 * kHalf) : share(d1, z1),
            value(k), (z0 + z1) >> 1};
  }

  // The number whose interval holds a target, by halving what is left, W ways at once.
  std::int32_t search(std::int32_t target, std::int32_t centre, std::int32_t m) const {
    std::int32_t low = 0, end = numbers;
    while (end - low > 1) {
      const std::int32_t step = (end - low + W - 1) / W;
      const I k = min_of(low + step * lanes(), all(end - 1));
      const I d = 2 * (boundary(k) - centre);
      const I at = share(d, z_of(d, all(m)));
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
