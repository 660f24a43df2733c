// Products of matrices of bf16. A product of two such numbers is exact in fp32; sums are made in
// fp32, in an order that follows from how many numbers are added and from nothing else: no bit
// depends on which other rows and columns there are, on how they lie in memory, or on threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip::bf16 {

// Bits of [batch, rows, inner], and how far apart these are, in numbers.
struct Matrices {
  const std::uint16_t* bits;
  std::ptrdiff_t batch, row, inner;
};

// Rows of `x` times rows of `w`: [batch, rows, columns].
struct Product {
  Matrices x, w;
  std::size_t batch, rows, columns, inner;
  const std::uint16_t* bias;  // [columns], added to each row; null for none
  std::uint16_t* rounded;     // where the sums go, rounded to bf16; or, if that is null,
  float* sums;                // as they are
};

void multiply(const Product& product, std::size_t threads);

}  // namespace kvzip::bf16
