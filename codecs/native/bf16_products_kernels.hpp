// What a set of instructions does with products of bf16 matrices.
//
// Two vectors of numbers at a time are brought to fp32. Each number of a product has as many sums
// as a vector has lanes, which are added up at the end: so both matrices are read as they lie, and
// neither is turned. Tiles of several rows and columns share what they read; in each of them a
// number is made by the same steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace kvzip::bf16 {

constexpr std::size_t kStep = 16;  // what inner sizes are filled up to, by zeros

struct Block {
  const float* x;  // [rows, inner], widened
  std::size_t x_stride;
  const std::uint16_t* w;  // [columns, inner]
  std::ptrdiff_t w_stride;
  std::size_t rows, columns, inner;
  float* sums;  // [rows, columns], to which the products are added
  std::size_t sums_stride;
};

struct Kernels {
  void (*widen)(const std::uint16_t* bits, std::size_t count, float* out);
  void (*add)(const Block& block);
  void (*round)(const float* sums, std::size_t count, std::uint16_t* out);
};

extern const Kernels baseline;
#ifdef KVZIP_X86
extern const Kernels avx2;
#endif

namespace {

#ifdef __AVX2__
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <typename V>
V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// One half of two vectors of numbers in fp32.
inline Floats half_of(int half, const std::uint16_t* bits) {
#ifdef __AVX2__
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits));
  const __m256i zero = _mm256_setzero_si256();
  return (Floats)(half ? _mm256_unpackhi_epi16(zero, all) : _mm256_unpacklo_epi16(zero, all));
#else
  const Words all = load<Words>(bits);
  return (Floats)(half ? all & 0xFFFF0000u : all << 16);
#endif
}

void widen(const std::uint16_t* bits, std::size_t count, float* out) {
  for (std::size_t i = 0; i < count; i += 2 * kLanes) {
    const Floats halves[2] = {half_of(0, bits + i), half_of(1, bits + i)};
    std::memcpy(out + i, halves, sizeof halves);
  }
}

Floats multiplied_and_added(Floats a, Floats b, Floats sum) {
#ifdef __FMA__
  // By intrinsics GCC 12 reads `a` from memory each time, and some sums, too: a tile needs all
  // registers, and two reads a cycle.
  asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return a * b + sum;
#endif
}

// The lanes of each: of eight ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
void add_up(Floats a, Floats b, Floats c, Floats d, float* out) {
#ifdef __AVX2__
  const __m256 pairs[2] = {_mm256_hadd_ps((__m256)a, (__m256)b),
                           _mm256_hadd_ps((__m256)c, (__m256)d)};
  const __m256 fours = _mm256_hadd_ps(pairs[0], pairs[1]);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
#else
  const Floats all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) out[i] = (all[i][0] + all[i][1]) + (all[i][2] + all[i][3]);
#endif
}

template <int kRows, int kColumns>
void add_tile(const Block& block, const float* x, const std::uint16_t* w, float* out) {
  constexpr int kNumbers = kRows * kColumns;
  Floats sums[kNumbers];
#pragma GCC unroll 12
  for (int i = 0; i < kNumbers; ++i) sums[i] = Floats{};
  for (std::size_t i = 0; i < block.inner; i += 2 * kLanes)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Floats b[kColumns];
      for (int n = 0; n < kColumns; ++n) b[n] = half_of(half, w + n * block.w_stride + i);
      for (int m = 0; m < kRows; ++m) {
        const Floats a = load<Floats>(x + m * block.x_stride + i + kLanes * half);
        for (int n = 0; n < kColumns; ++n)
          sums[m * kColumns + n] = multiplied_and_added(a, b[n], sums[m * kColumns + n]);
      }
    }
  const auto sum = [&](int i) { return i < kNumbers ? sums[i] : Floats{}; };
  float found[(kNumbers + 3) / 4 * 4];
#pragma GCC unroll 3
  for (int i = 0; i < kNumbers; i += 4)
    add_up(sum(i), sum(i + 1), sum(i + 2), sum(i + 3), found + i);
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kColumns; ++n) out[m * block.sums_stride + n] += found[m * kColumns + n];
}

// As many columns as registers allow.
template <int kRows>
void add_rows(const Block& block, std::size_t row) {
  constexpr int kColumns = kRows == 1 ? 6 : kRows <= 3 ? 4 : kRows == 4 ? 3 : 2;
  const float* const x = block.x + row * block.x_stride;
  float* const out = block.sums + row * block.sums_stride;
  const auto w = [&](std::size_t n) { return block.w + std::ptrdiff_t(n) * block.w_stride; };
  std::size_t n = 0;
  for (; n + kColumns <= block.columns; n += kColumns)
    add_tile<kRows, kColumns>(block, x, w(n), out + n);
  for (; n < block.columns; ++n) add_tile<kRows, 1>(block, x, w(n), out + n);
}

void add(const Block& block) {
  std::size_t row = 0;
  for (; row + 6 <= block.rows; row += 6) add_rows<6>(block, row);
  switch (block.rows - row) {
    case 1: return add_rows<1>(block, row);
    case 2: return add_rows<2>(block, row);
    case 3: return add_rows<3>(block, row);
    case 4: return add_rows<4>(block, row);
    case 5: return add_rows<5>(block, row);
    default: return;
  }
}

// To the nearest, ties to even.
void round(const float* sums, std::size_t count, std::uint16_t* out) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, sums + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out[i] = std::uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

constexpr Kernels kernels_here = {widen, add, round};

}  // namespace
}  // namespace kvzip::bf16
