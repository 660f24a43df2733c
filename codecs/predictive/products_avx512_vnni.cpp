// Products of bytes by AVX-512's VNNI.
#include <immintrin.h>

#include <cstring>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

constexpr std::size_t W = 16;  // tokens of a vector

// x still has its 128: `start` has what it comes to.
template <int N>
void products_of(const std::uint32_t* x, const std::int8_t* w, std::size_t groups,
                 const std::int32_t* start, std::size_t ahead, std::int32_t sums[4][kTile],
                 std::size_t t) {
  // Sums and words stay in registers: all loops but the one over groups are written out.
  __m512i sum[4][N];
#pragma GCC unroll 4
  for (int o = 0; o < 4; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sum[o][v] = _mm512_set1_epi32(start[o]);
  for (std::size_t g = 0; g < groups; ++g) {
    if (g % 4 == 0) _mm_prefetch(reinterpret_cast<const char*>(w + g * 16 + ahead), _MM_HINT_T0);
    __m512i word[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) word[v] = _mm512_loadu_si512(x + g * kTile + std::size_t(v) * W);
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o) {
      std::int32_t four;
      std::memcpy(&four, w + g * 16 + o * 4, 4);
      const __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[o][v] = _mm512_dpbusd_epi32(sum[o][v], word[v], weight);
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < 4; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) _mm512_storeu_si512(sums[o] + t + std::size_t(v) * W, sum[o][v]);
}

void of_four(const std::uint32_t* x, const std::int8_t* w, std::size_t groups, std::size_t ahead,
             const Order*, const std::int32_t* start, std::size_t n, std::int32_t sums[4][kTile]) {
  // Vectors of tokens, at most four at a time, in pieces of about the same size.
  const std::size_t vectors = (n + W - 1) / W, pieces = (vectors + 3) / 4;
  for (std::size_t piece = 0, t = 0; piece < pieces; ++piece) {
    const std::size_t take = (vectors - t + pieces - piece - 1) / (pieces - piece);
    const auto of = [&](auto products) {
      products(x + t * W, w, groups, start, ahead, sums, t * W);
    };
    if (take == 4) of(products_of<4>);
    else if (take == 3) of(products_of<3>);
    else if (take == 2) of(products_of<2>);
    else of(products_of<1>);
    t += take;
  }
}

}  // namespace

const Products avx512_vnni_products = {false, of_four};

}  // namespace kvzip::predictive
