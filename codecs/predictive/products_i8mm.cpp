// Products of bytes by NEON's products of matrices: of two tokens and two outputs, eight inputs
// each.
#include <arm_neon.h>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

constexpr std::size_t W = 4;  // tokens of a vector

// A group's words of two tokens, or its weights of two outputs, each followed by the next group's.
uint8x16_t first_two(uint32x4_t group, uint32x4_t next) {
  return vreinterpretq_u8_u32(vzip1q_u32(group, next));
}
uint8x16_t last_two(uint32x4_t group, uint32x4_t next) {
  return vreinterpretq_u8_u32(vzip2q_u32(group, next));
}

// x still has its 128: `start` has what it comes to.
void of_four(const std::uint32_t* x, const std::int8_t* w, std::size_t groups, std::size_t ahead,
             const Order*, const std::int32_t* start, std::size_t n, std::int32_t sums[4][kTile]) {
  // Sums and words stay in registers: all loops but the one over groups are written out.
  constexpr std::size_t N = 4;
  const auto weights = [&](std::size_t g) { return vreinterpretq_u32_s8(vld1q_s8(w + g * 16)); };
  const auto start_of = [&](std::size_t outputs) {
    const int32x2_t two = vld1_s32(start + outputs);
    return vcombine_s32(two, two);
  };
  for (std::size_t t = 0; t < n; t += N * W) {
    // [outputs by two][tokens by two] of [tokens][outputs]
    int32x4_t sum[2][2 * N];
#pragma GCC unroll 2
    for (std::size_t o = 0; o < 2; ++o)
#pragma GCC unroll 8
      for (std::size_t v = 0; v < 2 * N; ++v) sum[o][v] = start_of(2 * o);
    const auto words = [&](std::size_t g, std::size_t v) {
      return vld1q_u32(x + g * kTile + t + v * W);
    };
    const auto add = [&](std::size_t v, uint8x16_t of_tokens, int8x16_t first, int8x16_t last) {
      sum[0][v] = vusmmlaq_s32(sum[0][v], of_tokens, first);
      sum[1][v] = vusmmlaq_s32(sum[1][v], of_tokens, last);
    };
    std::size_t g = 0;
    for (; g + 2 <= groups; g += 2) {
      if (t == 0 && g % 4 == 0) __builtin_prefetch(w + g * 16 + ahead);
      const int8x16_t first = vreinterpretq_s8_u8(first_two(weights(g), weights(g + 1))),
                      last = vreinterpretq_s8_u8(last_two(weights(g), weights(g + 1)));
#pragma GCC unroll 4
      for (std::size_t v = 0; v < N; ++v) {
        const uint32x4_t of_g = words(g, v), of_next = words(g + 1, v);
        add(2 * v, first_two(of_g, of_next), first, last);
        add(2 * v + 1, last_two(of_g, of_next), first, last);
      }
    }
    if (g < groups) {
      const uint32x4_t none = vdupq_n_u32(0);
      const int8x16_t first = vreinterpretq_s8_u8(first_two(weights(g), none)),
                      last = vreinterpretq_s8_u8(last_two(weights(g), none));
#pragma GCC unroll 4
      for (std::size_t v = 0; v < N; ++v) {
        add(2 * v, first_two(words(g, v), none), first, last);
        add(2 * v + 1, last_two(words(g, v), none), first, last);
      }
    }
#pragma GCC unroll 2
    for (std::size_t o = 0; o < 2; ++o)
#pragma GCC unroll 4
      for (std::size_t v = 0; v < N; ++v) {
        const int32x4_t a = sum[o][2 * v], b = sum[o][2 * v + 1];
        vst1q_s32(sums[2 * o] + t + v * W, vuzp1q_s32(a, b));
        vst1q_s32(sums[2 * o + 1] + t + v * W, vuzp2q_s32(a, b));
      }
  }
}

}  // namespace

const Products i8mm_products = {false, of_four};

}  // namespace kvzip::predictive
