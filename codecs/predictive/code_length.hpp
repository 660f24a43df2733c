// How long a code intervals make.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

// Bits of `count` numbers whose shares are those `sizes`; an escape's is 0, and it takes as much as
// `escape`, of 1. Instruction sets differ in speed alone: products side by side, so that none waits
// for the one before, are the same ones everywhere.
inline double code_length(const std::uint32_t* sizes, std::size_t count, double escape) {
  constexpr std::size_t kProducts = 8;
  // One of so many shares of 24 bits fits a double. Logarithms are taken of what is left when their
  // exponents are counted.
  constexpr std::size_t kShares = 32;
  typedef std::int32_t Sizes __attribute__((vector_size(4 * kProducts)));
  typedef double Products __attribute__((vector_size(8 * kProducts)));
  const auto share = [&](double size) { return size != 0 ? size / kCdf : escape; };
  double sum = 0;
  std::size_t i = 0;
  while (i < count) {
    Products product = Products{} + 1.0;
    for (std::size_t k = 0; k < kShares && i + kProducts <= count; ++k, i += kProducts) {
      Sizes of;
      std::memcpy(&of, sizes + i, sizeof of);
      const Products size = __builtin_convertvector(of, Products);
      product *= size != 0.0 ? size / double(kCdf) : Products{} + escape;
    }
    if (count - i < kProducts)
      for (std::size_t p = 0; i < count; ++i, ++p) product[int(p)] *= share(double(sizes[i]));
    double all = 1;
    for (std::size_t p = 0; p < kProducts; ++p) {
      int exponent;
      all *= std::frexp(product[int(p)], &exponent);
      sum -= exponent;
    }
    sum -= std::log2(all);
  }
  return sum;
}

}  // namespace
}  // namespace kvzip::predictive
