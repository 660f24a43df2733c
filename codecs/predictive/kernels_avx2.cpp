// AVX2: eight tokens side by side.
#include <immintrin.h>

#include "predictive/vector_kernels.hpp"

namespace kvzip::predictive {
namespace {

typedef std::int32_t Numbers __attribute__((vector_size(32)));
typedef std::int64_t Wide __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

struct Avx2 : WideProducts<Avx2, Numbers, Wide>, Divided<Floats>, OneByOne, LaneByLane<Numbers> {
  static constexpr int W = 8;
  using I = Numbers;
  typedef std::uint32_t U __attribute__((vector_size(32)));
  using F = Floats;

  static std::uint64_t below(I a, I b) {
    return std::uint64_t(_mm256_movemask_ps((__m256)((U)a < (U)b)));
  }
  static I abs(I v) { return (I)_mm256_abs_epi32((__m256i)v); }
  static I least(I a, I b) { return (I)_mm256_min_epi32((__m256i)a, (__m256i)b); }
  static I most(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
  static F less(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
  static I low_halves(const std::uint64_t* x) {
    const __m256 both = _mm256_shuffle_ps(_mm256_loadu_ps((const float*)x),
                                          _mm256_loadu_ps((const float*)x + 8), 0x88);
    return (I)_mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xD8);
  }
  static Wide mul(I a, I b) { return (Wide)_mm256_mul_epi32((__m256i)a, (__m256i)b); }
  static I odd(I v) { return (I)_mm256_srli_epi64((__m256i)v, 32); }
  // 32 bits from bit S on of products of even and of odd lanes.
  template <int S>
  static I joined(Wide even, Wide odd) {
    return (I)_mm256_blend_epi32(_mm256_srli_epi64((__m256i)even, S),
                                 _mm256_slli_epi64((__m256i)odd, 32 - S), 0xAA);
  }
  static I z(I a, I m, std::int32_t limit) {
    // Where the product is far beyond the limit its bits would wrap; a rough product tells.
    const F rough = __builtin_convertvector(a, F) * __builtin_convertvector(m, F);
    const I most = I{} + limit;
    return rough > 34359738368.0f /* 2^35 */ ? most : least(product<12>(a, m), most);
  }

  // Two tables side by side. Eight loads of 64 bits take half as long as two gathers.
  struct Table : Paired {
    using Paired::Paired;
    void at(I i, I* a, I* b) const {
      const auto two = [&](int first, int second) {
        const __m128d low = _mm_load_sd(reinterpret_cast<const double*>(pair + 2 * i[first]));
        return _mm_loadh_pd(low, reinterpret_cast<const double*>(pair + 2 * i[second]));
      };
      const __m256 even = _mm256_castpd_ps(_mm256_set_m128d(two(4, 5), two(0, 1)));
      const __m256 odd = _mm256_castpd_ps(_mm256_set_m128d(two(6, 7), two(2, 3)));
      *a = (I)_mm256_shuffle_ps(even, odd, 0x88);
      *b = (I)_mm256_shuffle_ps(even, odd, 0xDD);
    }
  };
  struct Search : Fours {
    using Fours::Fours;
    F at(I step, F x) const {
      const I i = step & (kSteps - 1);
      const auto two = [&](int low, int high) {
        return _mm256_set_m128(_mm_loadu_ps(four + 4 * i[high]), _mm_loadu_ps(four + 4 * i[low]));
      };
      const __m256 a = two(0, 4), b = two(1, 5), c = two(2, 6), d = two(3, 7);
      const __m256d ab0 = (__m256d)_mm256_unpacklo_ps(a, b),
                    ab2 = (__m256d)_mm256_unpackhi_ps(a, b),
                    cd0 = (__m256d)_mm256_unpacklo_ps(c, d),
                    cd2 = (__m256d)_mm256_unpackhi_ps(c, d);
      const F of0 = (F)_mm256_unpacklo_pd(ab0, cd0), of1 = (F)_mm256_unpackhi_pd(ab0, cd0),
              of2 = (F)_mm256_unpacklo_pd(ab2, cd2), of3 = (F)_mm256_unpackhi_pd(ab2, cd2);
      return ((of3 * x + of2) * x + of1) * x + of0;
    }
  };
  static I at32(const std::int32_t* a, I at) {
    const auto i = (__m256i)at;
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)),
                 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(i, 27));
    const auto eight = [&](int k) {
      return _mm256_castsi256_ps(
          _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)(a + 8 * k)), i));
    };
    return (I)_mm256_blendv_ps(_mm256_blendv_ps(eight(0), eight(1), bit3),
                               _mm256_blendv_ps(eight(2), eight(3), bit3), bit4);
  }

  static const std::uint8_t* advance(std::uint64_t* x, const std::int32_t* size,
                                     const std::int32_t* rest, const std::uint8_t* word) {
    return advance_each<W>(x, size, rest, word);
  }

  static __m256i four_at(const std::int8_t* w) {
    float four;
    std::memcpy(&four, w, 4);
    return _mm256_castps_si256(_mm256_set1_ps(four));
  }
  // sums + w . x, x still with its 128: `start` has what it comes to. Bytes become words, as the
  // sum of two products of bytes may not fit 16 bits.
  static __m256i even_bytes(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
  static __m256i odd_bytes(__m256i x) { return _mm256_srli_epi16(x, 8); }
  static __m256i dots(__m256i sums, __m256i even, __m256i odd, __m256i w) {
    const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8),
                  odd_w = _mm256_srai_epi16(w, 8);
    return _mm256_add_epi32(
        sums, _mm256_add_epi32(_mm256_madd_epi16(even, even_w), _mm256_madd_epi16(odd, odd_w)));
  }
  static I dot(I sums, I words, const std::int8_t* w) {
    const auto x = (__m256i)words;
    return (I)dots((__m256i)sums, even_bytes(x), odd_bytes(x), four_at(w));
  }
  // By itself there are enough registers for it.
  __attribute__((noinline)) static void products(const std::uint32_t* x, const std::int8_t* w,
                                                 std::size_t groups, std::size_t ahead,
                                                 const Order* order, const std::int32_t* start,
                                                 std::size_t n, std::int32_t sums[4][kTile]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (std::size_t t = 0; t < n; t += 2 * W) {
      // Addresses are made in few steps: a processor begins no more than so many instructions a
      // cycle, and this loop comes near.
      const auto* const column = reinterpret_cast<const char*>(x + t);
      const auto tokens = [&](std::size_t group, int v) {
        return _mm256_loadu_si256((const __m256i*)(column + group * (4 * kTile)) + v);
      };
      // Sums and words stay in registers: all loops but those over groups are written out.
      __m256i sum[4][2];
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) sum[o][0] = sum[o][1] = _mm256_set1_epi32(start[o]);
      const std::uint16_t *g = order->group, *const alone = g + 2 * order->pairs,
                          *const end = g + groups;
      const std::int8_t* next = w + ahead;
      for (; g < alone; g += 2) {
        // 64 bytes serve two pairs; the other passes over the tokens find them fetched.
        if (t == 0) {
          __builtin_prefetch(next);
          next += 32;
        }
        const std::size_t first = g[0], second = g[1];
        const __m256i a[2] = {tokens(first, 0), tokens(first, 1)},
                      b[2] = {tokens(second, 0), tokens(second, 1)};
        const std::int8_t *const wa = w + first * 16, *const wb = w + second * 16;
#pragma GCC unroll 4
        for (int o = 0; o < 4; ++o) {
          const __m256i of_a = four_at(wa + o * 4), of_b = four_at(wb + o * 4);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(a[v], of_a),
                                                  _mm256_maddubs_epi16(b[v], of_b));
            sum[o][v] = _mm256_add_epi32(sum[o][v], _mm256_madd_epi16(both, ones));
          }
        }
      }
      for (; g < end; ++g) {
        __m256i even[2], odd[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          even[v] = even_bytes(tokens(*g, v));
          odd[v] = odd_bytes(tokens(*g, v));
        }
#pragma GCC unroll 4
        for (int o = 0; o < 4; ++o) {
          const __m256i of_g = four_at(w + *g * 16 + o * 4);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sum[o][v] = dots(sum[o][v], even[v], odd[v], of_g);
        }
      }
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm256_storeu_si256((__m256i*)(sums[o] + t) + v, sum[o][v]);
    }
  }
};

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels k = VectorKernels<Avx2>::kernels({true, Avx2::products});
  return k;
}

}  // namespace kvzip::predictive
