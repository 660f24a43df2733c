// The arithmetic of one number on a GPU (spec.md, "Density"): as density.hpp has it for vectors.
#pragma once

#include "native/cuda/device.cuh"
#include "predictive/device_jobs.hpp"

namespace kvzip::predictive {

constexpr int kCdf = 1 << 24, kEscape = 1 << 10;
constexpr int kHalf = (kCdf - kEscape) / 2;  // share above and below the centre
constexpr int kClamp = 1 << 28;
constexpr int kCells = 64, kAngles = 32, kGuesses = 512;
constexpr int kZBits = 16;
constexpr int kFarthest = (1 << (kZBits + 7)) - (1 << (kZBits - 1)) - 1;
constexpr int kFirstCell = (127 + kZBits - 1) << 3;  // exponent and top bits of cell 0
constexpr int kResidualShift = 12;

KVZIP_DEVICE int lesser(int a, int b) { return a < b ? a : b; }
KVZIP_DEVICE int greater(int a, int b) { return a > b ? a : b; }
KVZIP_DEVICE int clamp(int v, int limit) { return greater(lesser(v, limit), -limit); }
// Sums and differences that wrap.
KVZIP_DEVICE int sum(int a, int b) { return int(unsigned(a) + unsigned(b)); }
KVZIP_DEVICE int difference(int a, int b) { return int(unsigned(a) - unsigned(b)); }
// a b / 2^S, rounded.
template <int S>
KVZIP_DEVICE int scaled(int a, int b) {
  return int((int64_t(a) * b + (int64_t(1) << (S - 1))) >> S);
}
// a c + b s, 2^14 being 1.
KVZIP_DEVICE int turned(int a, int c, int b, int s) {
  return int((int64_t(a) * c + int64_t(b) * s + (1 << 13)) >> 14);
}

#ifdef __CUDACC__
KVZIP_DEVICE float as_float(int bits) { return __int_as_float(bits); }
KVZIP_DEVICE int as_bits(float v) { return __float_as_int(v); }
KVZIP_DEVICE int to_int(float v) { return __float2int_rz(v); }
KVZIP_DEVICE float about(float a, float b) { return __fdividef(a, b); }
#else
inline float as_float(int bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline int as_bits(float v) {
  int bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
// As a GPU cuts off: what is too great is the greatest, what is no number is 0.
inline int to_int(float v) {
  return v >= 2147483648.0f    ? 0x7FFFFFFF
         : v <= -2147483648.0f ? int(0x80000000u)
         : v == v              ? int(v)
                               : 0;
}
inline float about(float a, float b) { return a / b; }
#endif
// Exact for 0 <= v < 2^23.
KVZIP_DEVICE float small_to_float(int v) { return as_float(0x4B000000 | v) - 8388608.0f; }
KVZIP_DEVICE float power_of_two(int exponent) { return as_float((127 + exponent) << 23); }

// floor(2^24 / e) of an energy, 2^8 <= e <= 2^16.
KVZIP_DEVICE int inverse_energy(int e) {
  int q = to_int(about(16777216.0f, float(e)));
  q -= unsigned(q) * unsigned(e) > 16777216u;
  q += unsigned(q + 1) * unsigned(e) <= 16777216u;
  return q;
}
// How narrowly numbers lie: 2^12 z a unit, from 2^28 / mean deviation.
KVZIP_DEVICE int narrow(int inverse, int calm) { return int(int64_t(inverse) * calm >> 12); }

// What is expected of a number: about where, how narrowly, on which grid.
struct Expected {
  int centre, m, unit;
  const DeviceCell* cell;        // [kCells]
  const unsigned char* guesses;  // [kGuesses]
};
// A number's place among all of its format, its share of [0, 2^24), its fixed-point value and the
// mean |z| of its boundaries.
struct Found {
  int place, low, high, value, z;
};

KVZIP_DEVICE int z_of(int d, int m) {
  const int away = lesser(d < 0 ? -d : d, 1 << 26);
  const uint64_t z = uint64_t(unsigned(away)) * unsigned(m) >> 12;
  return z < uint64_t(kFarthest) ? int(z) : kFarthest;
}
// The share below a boundary that lies d from the centre.
KVZIP_DEVICE int share_below(int d, int z, const DeviceCell* cell) {
  const int bits = as_bits(small_to_float(z + (1 << (kZBits - 1))));
  const DeviceCell& c = cell[(bits >> 20) - kFirstCell];
  const int g = c.from + int(unsigned(c.rise) * unsigned(bits >> 8 & 0xFFF) >> 12);
  return kHalf + (d < 0 ? -g : g);
}

// The numbers of a format of E bits of exponent and M of mantissa, counted in their order.
template <int E, int M>
struct Grid {
  static constexpr int kBits = 1 + E + M, kNumbers = 1 << kBits, kMiddle = kNumbers / 2;
  static constexpr int kSpare = 23 - M, kBias = (1 << (E - 1)) - 1;
  static constexpr int kRebias = (127 - kBias) * (1 << 23);

  // The bits of a number from its place, and back.
  KVZIP_DEVICE static unsigned bits_of(int place) {
    return unsigned(place >= kMiddle ? place - kMiddle : kNumbers - 1 - place);
  }
  KVZIP_DEVICE static int place_of(unsigned bits) {
    return bits & unsigned(kMiddle) ? kNumbers - 1 - int(bits) : int(bits) + kMiddle;
  }

  // The fixed-point value of a magnitude, its bits as a float of 32 bits has them.
  KVZIP_DEVICE static int fixed(int bits, float units) {
    float v;
    if constexpr (kBias == 127) {
      v = as_float(lesser(bits, 0x7F000000));
    } else {
      constexpr int kOne = kRebias + (1 << 23);
      v = bits < 1 << 23 ? as_float(bits + kOne) - as_float(kOne) : as_float(bits + kRebias);
    }
    v *= units;
    return to_int(v < float(kClamp) ? v : float(kClamp));
  }
  // The boundary above a magnitude, away from 0 to the next whole number; 0 for -1.
  KVZIP_DEVICE static int above(int magnitude, float units) {
    const int found = fixed(greater(magnitude, 0) * (1 << kSpare) + (1 << (kSpare - 1)), units) + 1;
    return magnitude < 0 ? 0 : found;
  }

  KVZIP_DEVICE static Found interval(int place, const Expected& e) {
    Found f;
    f.place = place;
    const int s = place - kMiddle, sign = s >> 31, m = s ^ sign;
    const float units = power_of_two(-e.unit);
    const int inner = (above(m - 1, units) ^ sign) - sign, outer = (above(m, units) ^ sign) - sign;
    f.value = (fixed(m * (1 << kSpare), units) ^ sign) - sign;
    const int d0 = (sign ? outer : inner) - e.centre, d1 = (sign ? inner : outer) - e.centre;
    const int z0 = z_of(d0, e.m), z1 = z_of(d1, e.m);
    const int low = share_below(d0, z0, e.cell), high = share_below(d1, z1, e.cell);
    f.low = place == 0 ? 0 : low;
    f.high = place == kNumbers - 1 ? 2 * kHalf : high;
    f.z = (z0 + z1) >> 1;
    return f;
  }

  // The place of the number next to a value, or about that.
  KVZIP_DEVICE static int near(float v, int unit) {
    const int bits = as_bits(v * power_of_two(unit)), magnitude = bits & 0x7FFFFFFF;
    int m = (magnitude - kRebias + (1 << (kSpare - 1))) >> kSpare;
    if constexpr (kBias != 127) {  // subnormals are no float32's
      const float x = as_float(magnitude) * power_of_two(kBias - 1 + M) + 0.5f;
      if (m < 1 << M) m = to_int(x);
    }
    m = greater(lesser(m, kMiddle - 1), 0);
    return kMiddle + (bits < 0 ? ~m : m);
  }
  // About the number that a target belongs to; how it comes to that has no bearing on the format.
  // `step`: a unit's fixed-point value of 2^-16 z.
  KVZIP_DEVICE static int guess(int target, float step, const Expected& e) {
    const int c = lesser(target - kHalf, kHalf), g = c < 0 ? -c : c;
    const int tail = (as_bits(small_to_float(kHalf - g)) >> 18) - ((127 + 7) << 5);
    const int at = e.guesses[greater(tail, 0)];
    const DeviceCell a = e.cell[at], b = e.cell[lesser(at + 1, kCells - 1)];
    const bool next = g >= b.from;
    const float start = next ? b.start : a.start, slope = next ? b.slope : a.slope;
    const float in = small_to_float(greater(g - (next ? b.from : a.from), 0)) + 0.5f;
    const float away = (start + in * slope + 0.5f) * step;
    const float v = float(e.centre) + (c < 0 ? -away : away);
    return near(v < 0 ? v + 0.5f : v - 0.5f, e.unit);  // boundaries were moved away from 0
  }
  // The place of the number whose interval has the target, from another one's: in steps that grow,
  // then by halves. A call, and by value: what is called with an address lies in memory.
  KVZIP_DEVICE_CALL static int search(int target, int place, Expected e) {
    int low = 0, end = kNumbers;
#pragma unroll 1
    for (int step = 1; end - low > 1;) {
      const Found f = interval(place, e);
      if (target < f.low) end = place;
      else if (target >= f.high) low = place + 1;
      else return place;
      const int next = target < f.low ? place - step : place + step;
      place = next >= low && next < end ? next : (low + end) >> 1;
      step = lesser(2 * step, 1 << 12);
    }
    return lesser(low, kNumbers - 1);
  }
  KVZIP_DEVICE static Found find(int target, float step, const Expected& e) {
    int place = guess(target, step, e);
    Found f;
#pragma unroll 1
    for (int tries = 0;; ++tries) {
      f = interval(place, e);
      if ((target >= f.low && target < f.high) || tries == 2) return f;
      const int beside = target < f.low ? place - 1 : place + 1;  // mostly it is that
      place = tries ? search(target, place, e) : greater(lesser(beside, kNumbers - 1), 0);
    }
  }
};

}  // namespace kvzip::predictive
