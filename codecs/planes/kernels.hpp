// Bit planes: bit b of many numbers side by side. Layout in spec.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip::planes {

// `out` has 8*sizeof(T) planes of (n+7)/8 bytes, the most significant bit's first.
template <typename T>
void split_bits(const T* in, std::size_t n, std::uint8_t* out);

template <typename T>
void join_bits(const std::uint8_t* in, std::size_t n, T* out);

}  // namespace kvzip::planes
