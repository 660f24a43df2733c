#include "planes/kernels.hpp"

#include <cstring>

namespace kvzip::planes {
namespace {

// Transpose an 8x8 bit matrix: bit c of byte r becomes bit r of byte c.
// (Warren, Hacker's Delight, 7-3.)
inline std::uint64_t transpose8(std::uint64_t x) {
  std::uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAULL;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCULL;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ULL;
  return x ^ t ^ (t << 28);
}

}  // namespace

template <typename T>
void split_bits(const T* in, std::size_t n, std::uint8_t* out) {
  const std::size_t stride = (n + 7) / 8;
  for (std::size_t g = 0; g < stride; ++g) {
    const std::size_t count = n - 8 * g < 8 ? n - 8 * g : 8;
    for (std::size_t byte = 0; byte < sizeof(T); ++byte) {
      std::uint64_t matrix = 0;
      for (std::size_t i = 0; i < count; ++i)
        matrix |= std::uint64_t((in[8 * g + i] >> (8 * byte)) & 0xFF) << (8 * i);
      matrix = transpose8(matrix);
      for (std::size_t b = 0; b < 8; ++b)
        out[(8 * sizeof(T) - 1 - 8 * byte - b) * stride + g] = std::uint8_t(matrix >> (8 * b));
    }
  }
}

template <typename T>
void join_bits(const std::uint8_t* in, std::size_t n, T* out) {
  const std::size_t stride = (n + 7) / 8;
  for (std::size_t g = 0; g < stride; ++g) {
    const std::size_t count = n - 8 * g < 8 ? n - 8 * g : 8;
    T numbers[8] = {};
    for (std::size_t byte = 0; byte < sizeof(T); ++byte) {
      std::uint64_t matrix = 0;
      for (std::size_t b = 0; b < 8; ++b)
        matrix |= std::uint64_t(in[(8 * sizeof(T) - 1 - 8 * byte - b) * stride + g]) << (8 * b);
      matrix = transpose8(matrix);
      for (std::size_t i = 0; i < 8; ++i)
        numbers[i] = T(numbers[i] | T((matrix >> (8 * i)) & 0xFF) << (8 * byte));
    }
    std::memcpy(out + 8 * g, numbers, count * sizeof(T));
  }
}

template void split_bits(const std::uint8_t*, std::size_t, std::uint8_t*);
template void split_bits(const std::uint16_t*, std::size_t, std::uint8_t*);
template void split_bits(const std::uint32_t*, std::size_t, std::uint8_t*);
template void join_bits(const std::uint8_t*, std::size_t, std::uint8_t*);
template void join_bits(const std::uint8_t*, std::size_t, std::uint16_t*);
template void join_bits(const std::uint8_t*, std::size_t, std::uint32_t*);

}  // namespace kvzip::planes
