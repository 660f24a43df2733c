// One number of a grid, exactly: codes as integers, and the rounding of a product.
#pragma once

#include <algorithm>
#include <cstring>

#include "native/grid.hpp"

namespace kvzip::grid {

inline int bit_length(std::uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }

inline double power_of_two(int exponent) {  // of a normal double
  const auto bits = std::uint64_t(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// A magnitude in the narrow format's smallest steps: significand << power.
struct Magnitude {
  std::uint32_t significand;
  int power;
};

// Codes without their sign, and the magnitudes of two's complement, count magnitudes in order.
inline Magnitude magnitude(const Narrow& narrow, std::uint32_t index) {
  const std::uint32_t field = index >> narrow.mantissa;
  if (!field) return {index, 0};
  return {(index & ((1u << narrow.mantissa) - 1)) | (1u << narrow.mantissa), int(field) - 1};
}

// significand * 2^exponent
struct Product {
  std::uint64_t significand;
  int exponent;
};

// To `precision` bits, and to no step finer than 2^lowest; ties go to the even neighbour.
inline Product rounded(Product x, int precision, int lowest) {
  const int drop = std::max(bit_length(x.significand) - precision, lowest - x.exponent);
  if (drop <= 0) return x;
  if (drop > 62) return {0, lowest};
  const std::uint64_t half = 1ull << (drop - 1), rest = x.significand & (2 * half - 1);
  std::uint64_t kept = x.significand >> drop;
  kept += rest > half || (rest == half && (kept & 1));
  return {kept, x.exponent + drop};
}

// The step of the smallest numbers is 2^lowest.
inline int lowest(const Wide& wide) { return 2 - wide.bias - wide.precision; }

// The bits of a positive number of a wide format, or of infinity where it is too large.
inline std::uint32_t wide_bits(const Wide& wide, Product x) {
  if (!x.significand) return 0;
  const std::uint32_t infinity = (1u << (wide.bits - 1)) - (1u << (wide.precision - 1));
  int length = bit_length(x.significand);
  if (length > wide.precision) {  // a carry: the number is a power of two
    x = {x.significand >> 1, x.exponent + 1};
    --length;
  }
  const int shift = std::min(wide.precision - length, x.exponent - lowest(wide));
  x = {x.significand << shift, x.exponent - shift};
  if (bit_length(x.significand) < wide.precision) return std::uint32_t(x.significand);
  const int biased = x.exponent - lowest(wide) + 1;
  if (biased >= 2 * wide.bias + 1) return infinity;
  return (std::uint32_t(biased - 1) << (wide.precision - 1)) + std::uint32_t(x.significand);
}

// `scale.exponent` is in the narrow format's steps.
inline std::uint32_t widen_magnitude(const Wide& wide, const Narrow& narrow, Rounding rounding,
                                     std::uint32_t index, const Scale& scale) {
  const Magnitude m = magnitude(narrow, index);
  Product x{std::uint64_t(m.significand) * scale.significand, m.power + scale.exponent};
  if (rounding == Rounding::through_fp32) x = rounded(x, 24, -149);
  return wide_bits(wide, rounded(x, wide.precision, lowest(wide)));
}

inline std::uint32_t widen_one(const Wide& wide, const Narrow& narrow, Rounding rounding,
                               std::uint8_t code, const Scale& scale) {
  const std::uint32_t negative = 1u << (wide.bits - 1);
  if (narrow.integer) {
    const int value = std::int32_t(std::uint32_t(code) << (31 - narrow.sign)) >> (31 - narrow.sign);
    const auto index = std::uint32_t(value < 0 ? -value : value);
    return widen_magnitude(wide, narrow, rounding, index, scale) | (value < 0 ? negative : 0);
  }
  const std::uint32_t infinity = negative - (1u << (wide.precision - 1));
  const std::uint32_t nan = infinity | (1u << (wide.precision - 2));
  if (code == narrow.nan) return nan;
  const std::uint32_t sign = (code >> narrow.sign) & 1 ? negative : 0;
  const int index = code & ((1 << narrow.sign) - 1);
  if (index > narrow.largest) return sign | (index == narrow.infinity ? infinity : nan);
  return sign | widen_magnitude(wide, narrow, rounding, std::uint32_t(index), scale);
}

}  // namespace kvzip::grid
