// AVX2: eight tokens side by side.
#include <immintrin.h>

#include "predictive/kernels_of.hpp"

namespace kvzip::predictive {
namespace {

struct Avx2 {
  static constexpr int W = 8;
  typedef std::int32_t I __attribute__((vector_size(32)));
  typedef std::uint32_t U __attribute__((vector_size(32)));
  typedef float F __attribute__((vector_size(32)));

  static bool any(I m) { return _mm256_movemask_ps((__m256)m) != 0; }
  static __m256i odd(I v) { return _mm256_srli_epi64((__m256i)v, 32); }
  // 32 bits from bit S on of products of even and of odd lanes.
  template <int S>
  static I joined(__m256i even, __m256i odd) {
    return (I)_mm256_blend_epi32(_mm256_srli_epi64(even, S), _mm256_slli_epi64(odd, 32 - S), 0xAA);
  }
  template <int S>
  static I product(I a, I b) {
    return joined<S>(_mm256_mul_epi32((__m256i)a, (__m256i)b), _mm256_mul_epi32(odd(a), odd(b)));
  }
  template <int S>
  static I scaled(I a, I b) {
    const __m256i half = _mm256_set1_epi64x(1ll << (S - 1));
    return joined<S>(_mm256_add_epi64(_mm256_mul_epi32((__m256i)a, (__m256i)b), half),
                     _mm256_add_epi64(_mm256_mul_epi32(odd(a), odd(b)), half));
  }
  static I turned(I a, I c, I b, I s) {
    const __m256i half = _mm256_set1_epi64x(1 << 13);
    const __m256i even = _mm256_add_epi64(_mm256_mul_epi32((__m256i)a, (__m256i)c),
                                          _mm256_mul_epi32((__m256i)b, (__m256i)s));
    const __m256i other = _mm256_add_epi64(_mm256_mul_epi32(odd(a), odd(c)), _mm256_mul_epi32(odd(b), odd(s)));
    return joined<14>(_mm256_add_epi64(even, half), _mm256_add_epi64(other, half));
  }
  static I z(I a, I m, std::int32_t limit) {
    // Where the product is far beyond the limit its bits would wrap; a rough product tells.
    const F rough = __builtin_convertvector(a, F) * __builtin_convertvector(m, F);
    const I v = product<15>(a, m);
    const I most = I{} + limit;
    return rough > 68719476736.0f /* 2^36 */ ? most : v < most ? v : most;
  }

  struct Table {
    const std::int32_t *from, *rise;
    Table(const std::int32_t* f, const std::int32_t* r) : from(f), rise(r) {}
    void at(I cell, I* f, I* r) const {
      *f = (I)_mm256_i32gather_epi32(from, (__m256i)cell, 4);
      *r = (I)_mm256_i32gather_epi32(rise, (__m256i)cell, 4);
    }
  };
  static void at64(const float* a, const float* b, I at, F* va, F* vb) {
    *va = (F)_mm256_i32gather_ps(a, (__m256i)at, 4);
    *vb = (F)_mm256_i32gather_ps(b, (__m256i)at, 4);
  }
  static I at32(const std::int32_t* a, I at) { return (I)_mm256_i32gather_epi32(a, (__m256i)at, 4); }

  static const std::uint8_t* advance(std::uint64_t* x, U size, U rest, const std::uint8_t* word) {
    return advance_each<W>(x, size, rest, word);
  }

  // sums + w . (x - 128). The instruction multiplies unsigned by signed and saturates at 16 bits,
  // which |x - 128| times w cannot reach; so signs go over to w.
  static __m256i dots(__m256i sums, __m256i size, __m256i x, std::int32_t w) {
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(w), x));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I dot(I sums, I words, const std::int8_t* w) {
    std::int32_t four;
    std::memcpy(&four, w, 4);
    const __m256i x = _mm256_xor_si256((__m256i)words, _mm256_set1_epi8(-128));
    return (I)dots((__m256i)sums, _mm256_abs_epi8(x), x, four);
  }
  static void products(const std::uint32_t* x, const std::int8_t* w, std::size_t groups, const std::int32_t*,
                       std::size_t n, std::int32_t sums[4][kTile]) {
    for (std::size_t t = 0; t < n; t += 2 * W) {
      __m256i sum[4][2] = {};
      for (std::size_t g = 0; g < groups; ++g) {
        std::int32_t four[4];
        std::memcpy(four, w + g * 16, 16);
        for (int v = 0; v < 2; ++v) {
          const __m256i word = _mm256_xor_si256(
              _mm256_loadu_si256((const __m256i*)(x + g * kTile + t) + v), _mm256_set1_epi8(-128));
          const __m256i size = _mm256_abs_epi8(word);
          for (int o = 0; o < 4; ++o) sum[o][v] = dots(sum[o][v], size, word, four[o]);
        }
      }
      for (int o = 0; o < 4; ++o)
        for (int v = 0; v < 2; ++v) _mm256_storeu_si256((__m256i*)(sums[o] + t) + v, sum[o][v]);
    }
  }
};

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels k = Of<Avx2>::kernels();
  return k;
}

}  // namespace kvzip::predictive
