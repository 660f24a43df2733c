// Products of bytes by AVX's VNNI.
#include <immintrin.h>

#include <cstring>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

constexpr std::size_t W = 8;  // tokens of a vector

__m256i four_at(const std::int8_t* w) {
  float four;
  std::memcpy(&four, w, 4);
  return _mm256_castps_si256(_mm256_set1_ps(four));
}

// x still has its 128: `start` has what it comes to.
void of_four(const std::uint32_t* x, const std::int8_t* w, std::size_t groups, std::size_t ahead,
             const Order*, const std::int32_t* start, std::size_t n, std::int32_t sums[4][kTile]) {
  // Sums and words stay in registers, of which there are 16: all loops but the one over groups are
  // written out.
  constexpr std::size_t N = 2;
  for (std::size_t t = 0; t < n; t += N * W) {
    __m256i sum[4][N];
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o)
#pragma GCC unroll 2
      for (std::size_t v = 0; v < N; ++v) sum[o][v] = _mm256_set1_epi32(start[o]);
    for (std::size_t g = 0; g < groups; ++g) {
      if (t == 0 && g % 4 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(w + g * 16 + ahead), _MM_HINT_T0);
      __m256i word[N];
#pragma GCC unroll 2
      for (std::size_t v = 0; v < N; ++v)
        word[v] = _mm256_loadu_si256((const __m256i*)(x + g * kTile + t + v * W));
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) {
        const __m256i weight = four_at(w + g * 16 + o * 4);
#pragma GCC unroll 2
        for (std::size_t v = 0; v < N; ++v)
          sum[o][v] = _mm256_dpbusd_avx_epi32(sum[o][v], word[v], weight);
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o)
#pragma GCC unroll 2
      for (std::size_t v = 0; v < N; ++v)
        _mm256_storeu_si256((__m256i*)(sums[o] + t + v * W), sum[o][v]);
  }
}

}  // namespace

const Products vnni_products = {false, of_four};

}  // namespace kvzip::predictive
