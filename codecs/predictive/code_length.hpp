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
  // One of so many shares, each of 30 bits at most, fits a double; then its exponent is counted.
  constexpr std::size_t kShares = 32;
  constexpr int kMantissa = 52, kBias = 1023;
  typedef std::int32_t Sizes __attribute__((vector_size(4 * kProducts)));
  typedef std::int64_t Bits __attribute__((vector_size(8 * kProducts)));
  typedef double Products __attribute__((vector_size(8 * kProducts)));
  Products product = Products{} + 1.0;
  Bits exponents{};
  const auto count_exponents = [&] {
    Bits bits;
    std::memcpy(&bits, &product, sizeof bits);
    exponents += (bits >> kMantissa) - kBias;
    bits = (bits & ((std::int64_t(1) << kMantissa) - 1)) | (std::int64_t(kBias) << kMantissa);
    std::memcpy(&product, &bits, sizeof bits);
  };
  std::size_t i = 0;
  while (i < count) {
    for (std::size_t k = 0; k < kShares && i < count; ++k, i += kProducts) {
      Sizes of = Sizes{} + std::int32_t(kCdf);  // behind the last one
      const std::size_t n = std::min(kProducts, count - i);
      if (n == kProducts) std::memcpy(&of, sizes + i, sizeof of);
      else std::memcpy(&of, sizes + i, n * sizeof *sizes);
      const Products size = __builtin_convertvector(of, Products);
      product *= size != 0.0 ? size / double(kCdf) : Products{} + escape;
    }
    count_exponents();
  }
  double all = 1, sum = 0;
  for (std::size_t p = 0; p < kProducts; ++p) {
    all *= product[int(p)];
    sum -= double(exponents[int(p)]);
  }
  return sum - std::log2(all);
}

}  // namespace
}  // namespace kvzip::predictive
