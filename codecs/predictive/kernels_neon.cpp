// NEON, of every 64-bit ARM processor: four tokens side by side.
#include <arm_neon.h>

#include "predictive/vector_kernels.hpp"

namespace kvzip::predictive {
namespace {

typedef std::int32_t Numbers __attribute__((vector_size(16)));

struct Neon : OneByOne, LaneByLane<Numbers> {
  static constexpr int W = 4;
  using I = Numbers;
  typedef std::uint32_t U __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));

  static std::uint64_t below(I a, I b) {
    const uint32x4_t bit = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcltq_u32((uint32x4_t)a, (uint32x4_t)b), bit));
  }
  static I abs(I v) { return (I)vabsq_s32((int32x4_t)v); }
  static I least(I a, I b) { return (I)vminq_s32((int32x4_t)a, (int32x4_t)b); }
  static I most(I a, I b) { return (I)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
  // NEON's own is a NaN where one of the two is.
  static F less(F a, F b) { return a < b ? a : b; }
  // An estimate of 8 bits, and a step of Newton's.
  static F reciprocal(F v) {
    const auto of = (float32x4_t)v;
    const float32x4_t about = vrecpeq_f32(of);
    return (F)vmulq_f32(about, vrecpsq_f32(of, about));
  }
  static I low_halves(const std::uint64_t* x) {
    return (I)vuzp1q_u32(vreinterpretq_u32_u64(vld1q_u64(x)),
                         vreinterpretq_u32_u64(vld1q_u64(x + 2)));
  }

  // Products of 64 bits, of the first two lanes and of the others.
  struct Wide {
    int64x2_t low, high;
  };
  static Wide mul(I a, I b) {
    const auto x = (int32x4_t)a, y = (int32x4_t)b;
    return {vmull_s32(vget_low_s32(x), vget_low_s32(y)), vmull_high_s32(x, y)};
  }
  static Wide add_mul(Wide sum, I a, I b) {
    const auto x = (int32x4_t)a, y = (int32x4_t)b;
    return {vmlal_s32(sum.low, vget_low_s32(x), vget_low_s32(y)), vmlal_high_s32(sum.high, x, y)};
  }
  // 32 bits from bit S on, rounded to the nearest.
  template <int S>
  static I rounded(Wide v) {
    return (I)vrshrn_high_n_s64(vrshrn_n_s64(v.low, S), v.high, S);
  }
  template <int S>
  static I product(I a, I b) {
    const Wide v = mul(a, b);
    return (I)vshrn_high_n_s64(vshrn_n_s64(v.low, S), v.high, S);
  }
  template <int S>
  static I scaled(I a, I b) {
    return rounded<S>(mul(a, b));
  }
  // a*c + b*s, 2^14 being 1.
  static I turned(I a, I c, I b, I s) { return rounded<14>(add_mul(mul(a, c), b, s)); }
  static I z(I a, I m, std::int32_t limit) {
    const Wide v = mul(a, m);
    return least((I)vqshrn_high_n_s64(vqshrn_n_s64(v.low, 12), v.high, 12), I{} + limit);
  }

  // Lanes as places in memory, none below 0. Two at a time leave their register.
  struct Places {
    std::size_t of[W];
    explicit Places(I v) {
      const auto twos = (uint64x2_t)v;
      const std::uint64_t low = vgetq_lane_u64(twos, 0), high = vgetq_lane_u64(twos, 1);
      of[0] = std::uint32_t(low);
      of[1] = std::uint32_t(low >> 32);
      of[2] = std::uint32_t(high);
      of[3] = std::uint32_t(high >> 32);
    }
  };
  struct Table : Paired {
    using Paired::Paired;
    void at(I i, I* a, I* b) const {
      const Places place(i);
      const auto two = [&](int k) {
        return vcombine_s32(vld1_s32(pair + 2 * place.of[k]), vld1_s32(pair + 2 * place.of[k + 1]));
      };
      const int32x4_t low = two(0), high = two(2);
      *a = (I)vuzp1q_s32(low, high);
      *b = (I)vuzp2q_s32(low, high);
    }
  };
  struct Search : Fours {
    using Fours::Fours;
    F at(I step, F x) const {
      const Places place(step & (kSteps - 1));
      const auto of = [&](int k) { return vld1q_f32(four + 4 * place.of[k]); };
      const float32x4_t a = of(0), b = of(1), c = of(2), d = of(3);
      const auto pairs = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
      const float64x2_t ab02 = pairs(vtrn1q_f32(a, b)), ab13 = pairs(vtrn2q_f32(a, b)),
                        cd02 = pairs(vtrn1q_f32(c, d)), cd13 = pairs(vtrn2q_f32(c, d));
      const auto singles = [](float64x2_t v) { return vreinterpretq_f32_f64(v); };
      const float32x4_t of0 = singles(vzip1q_f64(ab02, cd02)),
                        of1 = singles(vzip1q_f64(ab13, cd13)),
                        of2 = singles(vzip2q_f64(ab02, cd02)),
                        of3 = singles(vzip2q_f64(ab13, cd13));
      const auto v = (float32x4_t)x;
      return (F)vfmaq_f32(of0, v, vfmaq_f32(of1, v, vfmaq_f32(of2, v, of3)));
    }
  };
  static I at32(const std::int32_t* a, I at) { return I{a[at[0]], a[at[1]], a[at[2]], a[at[3]]}; }

  static const std::uint8_t* advance(std::uint64_t* x, const std::int32_t* size,
                                     const std::int32_t* rest, const std::uint8_t* word) {
    for (int i = 0; i < W; ++i) {
      const std::uint64_t y =
          std::uint64_t(std::uint32_t(size[i])) * (x[i] >> kCdfBits) + std::uint32_t(rest[i]);
      std::uint32_t next;
      std::memcpy(&next, word, 4);
      const std::size_t low = y < kLow;
      x[i] = low ? y << 32 | next : y;
      word += 4 * low;
    }
    return word;
  }

  // Bytes less 128 are from -127 to 127, as weights are, so sums of two products fit 16 bits. By
  // itself there are enough registers for it.
  __attribute__((noinline)) static void products(const std::uint32_t* x, const std::int8_t* w,
                                                 std::size_t groups, std::size_t ahead,
                                                 const Order*, const std::int32_t*, std::size_t n,
                                                 std::int32_t sums[4][kTile]) {
    constexpr std::size_t N = 2;  // vectors of tokens
    const uint32x4_t half = vdupq_n_u32(0x80808080);
    for (std::size_t t = 0; t < n; t += N * W) {
      const auto tokens = [&](std::size_t group, std::size_t v) {
        return vreinterpretq_s8_u32(veorq_u32(vld1q_u32(x + group * kTile + t + v * W), half));
      };
      // Sums stay in registers: all loops but the one over groups are written out. Those of a
      // token's first two bytes and of its others are added up last.
      int32x4_t sum[4][N][2];
#pragma GCC unroll 4
      for (std::size_t o = 0; o < 4; ++o)
#pragma GCC unroll 2
        for (std::size_t v = 0; v < N; ++v) sum[o][v][0] = sum[o][v][1] = vdupq_n_s32(0);
      std::size_t g = 0;
      for (; g + 2 <= groups; g += 2) {
        if (t == 0 && g % 4 == 0) __builtin_prefetch(w + g * 16 + ahead);
        const int32x4_t of_a = vreinterpretq_s32_s8(vld1q_s8(w + g * 16)),
                        of_b = vreinterpretq_s32_s8(vld1q_s8(w + g * 16 + 16));
        int8x16_t a[N], b[N];
#pragma GCC unroll 2
        for (std::size_t v = 0; v < N; ++v) {
          a[v] = tokens(g, v);
          b[v] = tokens(g + 1, v);
        }
        const auto add = [&](int32x4_t(*to)[2], int32x4_t four_of_a, int32x4_t four_of_b) {
          const int8x16_t wa = vreinterpretq_s8_s32(four_of_a),
                          wb = vreinterpretq_s8_s32(four_of_b);
#pragma GCC unroll 2
          for (std::size_t v = 0; v < N; ++v) {
            const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a[v]), vget_low_s8(wa)),
                                           vget_low_s8(b[v]), vget_low_s8(wb)),
                            high = vmlal_high_s8(vmull_high_s8(a[v], wa), b[v], wb);
            to[v][0] = vpadalq_s16(to[v][0], low);
            to[v][1] = vpadalq_s16(to[v][1], high);
          }
        };
        add(sum[0], vdupq_laneq_s32(of_a, 0), vdupq_laneq_s32(of_b, 0));
        add(sum[1], vdupq_laneq_s32(of_a, 1), vdupq_laneq_s32(of_b, 1));
        add(sum[2], vdupq_laneq_s32(of_a, 2), vdupq_laneq_s32(of_b, 2));
        add(sum[3], vdupq_laneq_s32(of_a, 3), vdupq_laneq_s32(of_b, 3));
      }
      if (g < groups)
#pragma GCC unroll 4
        for (std::size_t o = 0; o < 4; ++o) {
          std::int32_t four;
          std::memcpy(&four, w + g * 16 + o * 4, 4);
          const int8x16_t of_g = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 2
          for (std::size_t v = 0; v < N; ++v) {
            const int8x16_t a = tokens(g, v);
            sum[o][v][0] = vpadalq_s16(sum[o][v][0], vmull_s8(vget_low_s8(a), vget_low_s8(of_g)));
            sum[o][v][1] = vpadalq_s16(sum[o][v][1], vmull_high_s8(a, of_g));
          }
        }
#pragma GCC unroll 4
      for (std::size_t o = 0; o < 4; ++o)
#pragma GCC unroll 2
        for (std::size_t v = 0; v < N; ++v)
          vst1q_s32(sums[o] + t + v * W, vpaddq_s32(sum[o][v][0], sum[o][v][1]));
    }
  }
};

}  // namespace

const Kernels& neon_kernels() {
  static constexpr Kernels k = VectorKernels<Neon>::kernels({false, Neon::products});
  return k;
}

}  // namespace kvzip::predictive
