// The number formats of caches: a sign, an exponent, a mantissa.
#pragma once

#include <cstddef>
#include <stdexcept>

namespace kvzip {

struct NumberFormat {
  int exponent_bits, mantissa_bits;
  // Of sign and exponent.
  int value_bits() const { return 1 + exponent_bits; }
  int bits() const { return value_bits() + mantissa_bits; }
  std::size_t itemsize() const { return std::size_t(bits()) / 8; }
  // Throws std::invalid_argument unless it is one of bf16, fp32, fp16, fp8_e5m2 and fp8_e4m3fn.
  void check() const {
    const int e = exponent_bits, m = mantissa_bits;
    if (!((e == 8 && (m == 7 || m == 23)) || (e == 5 && (m == 10 || m == 2)) || (e == 4 && m == 3)))
      throw std::invalid_argument("not a number format of ours");
  }
};

}  // namespace kvzip
