// RoPE as models turn a pair of keys in bf16, on a GPU: as rotation.hpp has it for vectors.
#pragma once

#include "predictive/density.cuh"

namespace kvzip::predictive {

// Steps of IEEE 754, each rounded once, to the nearest.
#ifdef __CUDACC__
KVZIP_DEVICE float product_of(float a, float b) { return __fmul_rn(a, b); }
KVZIP_DEVICE float sum_of(float a, float b) { return __fadd_rn(a, b); }
#else
inline float product_of(float a, float b) { return a * b; }
inline float sum_of(float a, float b) { return a + b; }
#endif

// |a b| as a float32, whose bits are in the order of what they stand for.
KVZIP_DEVICE int product_size(int a, int b) {
  return as_bits(product_of(float(a), float(b))) & 0x7FFFFFFF;
}

// Cosine and sine of a pair, and whether products are rounded or sums alone.
struct Rotation {
  float cosine, sine;
  bool rounds_products;

  // To the nearest number of bf16, ties to even.
  KVZIP_DEVICE static unsigned rounded(float v) {
    const unsigned bits = unsigned(as_bits(v));
    return (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  }
  // A number before RoPE is from 2^-60 to 2^61; any other counts as 0.
  KVZIP_DEVICE static float number(unsigned bits) {
    const unsigned exponent = bits >> 7 & 255;
    const bool counts = exponent >= 127 - 60 && exponent <= 127 + 60;
    return as_float(int((counts ? bits : bits & 0x8000) << 16));
  }
  KVZIP_DEVICE float product(float a, float by) const {
    const float v = product_of(a, by);
    return rounds_products ? as_float(int(rounded(v))) : v;
  }
  // What RoPE makes of a pair, given by the bits of its numbers.
  KVZIP_DEVICE void turn(unsigned (&pair)[2]) const {
    const float a = number(pair[0]), b = number(pair[1]);
    pair[0] = rounded(sum_of(product(a, cosine), -product(b, sine))) >> 16;
    pair[1] = rounded(sum_of(product(b, cosine), product(a, sine))) >> 16;
  }
};

}  // namespace kvzip::predictive
