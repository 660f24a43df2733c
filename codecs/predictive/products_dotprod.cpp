// Products of bytes by NEON's dot products.
#include <arm_neon.h>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

constexpr std::size_t W = 4;  // tokens of a vector

// Both kinds of bytes are signed, so 128 is taken off first.
void of_four(const std::uint32_t* x, const std::int8_t* w, std::size_t groups, std::size_t ahead,
             const Order*, const std::int32_t*, std::size_t n, std::int32_t sums[4][kTile]) {
  // Sums and words stay in registers: all loops but the one over groups are written out.
  constexpr std::size_t N = 4;
  const uint32x4_t half = vdupq_n_u32(0x80808080);
  for (std::size_t t = 0; t < n; t += N * W) {
    int32x4_t sum[4][N];
#pragma GCC unroll 4
    for (std::size_t o = 0; o < 4; ++o)
#pragma GCC unroll 4
      for (std::size_t v = 0; v < N; ++v) sum[o][v] = vdupq_n_s32(0);
    for (std::size_t g = 0; g < groups; ++g) {
      if (t == 0 && g % 4 == 0) __builtin_prefetch(w + g * 16 + ahead);
      const int8x16_t weight = vld1q_s8(w + g * 16);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < N; ++v) {
        const int8x16_t word =
            vreinterpretq_s8_u32(veorq_u32(vld1q_u32(x + g * kTile + t + v * W), half));
        sum[0][v] = vdotq_laneq_s32(sum[0][v], word, weight, 0);
        sum[1][v] = vdotq_laneq_s32(sum[1][v], word, weight, 1);
        sum[2][v] = vdotq_laneq_s32(sum[2][v], word, weight, 2);
        sum[3][v] = vdotq_laneq_s32(sum[3][v], word, weight, 3);
      }
    }
#pragma GCC unroll 4
    for (std::size_t o = 0; o < 4; ++o)
#pragma GCC unroll 4
      for (std::size_t v = 0; v < N; ++v) vst1q_s32(sums[o] + t + v * W, sum[o][v]);
  }
}

}  // namespace

const Products dotprod_products = {false, of_four};

}  // namespace kvzip::predictive
