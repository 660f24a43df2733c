// AVX-512 with VNNI: sixteen tokens side by side, a density's whole table in eight registers.
#include <immintrin.h>

#include "predictive/vector_kernels.hpp"

namespace kvzip::predictive {
namespace {

typedef std::int32_t Numbers __attribute__((vector_size(64)));
typedef std::int64_t Wide __attribute__((vector_size(64)));

struct Avx512 : WideProducts<Avx512, Numbers, Wide> {
  static constexpr int W = 16;
  using I = Numbers;
  typedef std::uint32_t U __attribute__((vector_size(64)));
  typedef float F __attribute__((vector_size(64)));

  static bool any(I m) { return _mm512_movepi32_mask((__m512i)m) != 0; }
  static I abs(I v) { return (I)_mm512_abs_epi32((__m512i)v); }
  static F less(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
  static I where_positive(I sign, I v) {
    return (I)_mm512_maskz_mov_epi32(_mm512_cmpgt_epi32_mask((__m512i)sign, _mm512_setzero_si512()),
                                     (__m512i)v);
  }
  static F reciprocal(F v) { return (F)_mm512_rcp14_ps((__m512)v); }
  // The place before or after, where g lies below or above the one that goes from `start` on.
  static I neighbour(I place, I g, I start, I size) {
    const __m512i one = _mm512_set1_epi32(1), v = (__m512i)g;
    const __mmask16 above = _mm512_cmpge_epi32_mask(v, (__m512i)(start + size)),
                    below = _mm512_cmpgt_epi32_mask((__m512i)start, v);
    const __m512i up = _mm512_mask_add_epi32((__m512i)place, above, (__m512i)place, one);
    return (I)_mm512_mask_sub_epi32(up, below, up, one);
  }
  static I low_halves(const std::uint64_t* x) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (I)_mm512_permutex2var_epi32(_mm512_loadu_si512(x), even, _mm512_loadu_si512(x + 8));
  }
  static Wide mul(I a, I b) { return (Wide)_mm512_mul_epi32((__m512i)a, (__m512i)b); }
  static I odd(I v) { return (I)_mm512_srli_epi64((__m512i)v, 32); }
  // 32 bits from bit S on of products of even and of odd lanes.
  template <int S>
  static I joined(Wide even, Wide odd) {
    return (I)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64((__m512i)even, S),
                                      _mm512_slli_epi64((__m512i)odd, 32 - S));
  }
  static I z(I a, I m, std::int32_t limit) {
    const __m512i most = _mm512_set1_epi64(limit);
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)a, (__m512i)m), 13);
    const __m512i other = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)odd(a), (__m512i)odd(m)), 13);
    return (I)_mm512_or_si512(_mm512_min_epu64(even, most),
                              _mm512_slli_epi64(_mm512_min_epu64(other, most), 32));
  }

  struct Table {
    __m512i from[4], rise[4];
    Table(const Densities& d, std::size_t shape) {
      // A place's low bits say which register and where in it.
      static_assert(kFirstCell % kCells == 48);
      for (std::size_t i = 0; i < 4; ++i) {
        from[(i + 3) % 4] = _mm512_loadu_si512(d.from + kCells * shape + 16 * i);
        rise[(i + 3) % 4] = _mm512_loadu_si512(d.rise + kCells * shape + 16 * i);
      }
    }
    void at(I place, I* f, I* r) const {
      const __m512i c = (__m512i)place;
      const __mmask16 upper = _mm512_test_epi32_mask(c, _mm512_set1_epi32(32));
      *f = (I)_mm512_mask_blend_epi32(upper, _mm512_permutex2var_epi32(from[0], c, from[1]),
                                      _mm512_permutex2var_epi32(from[2], c, from[3]));
      *r = (I)_mm512_mask_blend_epi32(upper, _mm512_permutex2var_epi32(rise[0], c, rise[1]),
                                      _mm512_permutex2var_epi32(rise[2], c, rise[3]));
    }
  };
  struct Search {
    const float *cell, *slope;
    Search(const Densities& d, std::size_t shape)
        : cell(d.cell + 64 * shape), slope(d.slope + 64 * shape) {}
    void at(I i, F* c, F* s) const {
      *c = (F)at64(cell, (__m512i)i);
      *s = (F)at64(slope, (__m512i)i);
    }
    static __m512 at64(const float* a, __m512i at) {
      return _mm512_mask_blend_ps(
          _mm512_test_epi32_mask(at, _mm512_set1_epi32(32)),
          _mm512_permutex2var_ps(_mm512_loadu_ps(a), at, _mm512_loadu_ps(a + 16)),
          _mm512_permutex2var_ps(_mm512_loadu_ps(a + 32), at, _mm512_loadu_ps(a + 48)));
    }
  };
  static I at32(const std::int32_t* a, I at) {
    return (I)_mm512_permutex2var_epi32(_mm512_loadu_si512(a), (__m512i)at,
                                        _mm512_loadu_si512(a + 16));
  }

  static const std::uint8_t* advance(std::uint64_t* states, U size, U rest,
                                     const std::uint8_t* word) {
    for (int h = 0; h < 2; ++h) {
      const __m512i x = _mm512_srli_epi64(_mm512_loadu_si512(states + 8 * h), kCdfBits);
      const __m512i s = _mm512_cvtepu32_epi64(_mm512_extracti32x8_epi32((__m512i)size, 0));
      const __m512i r = _mm512_cvtepu32_epi64(_mm512_extracti32x8_epi32((__m512i)rest, 0));
      // 24 bits times 39, in two products.
      const __m512i y =
          _mm512_add_epi64(_mm512_add_epi64(_mm512_mul_epu32(x, s), r),
                           _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(x, 32), s), 32));
      const __mmask8 low = _mm512_cmplt_epu64_mask(y, _mm512_set1_epi64(kLow));
      const __m512i next = _mm512_cvtepu32_epi64(_mm256_maskz_expandloadu_epi32(low, word));
      _mm512_storeu_si512(states + 8 * h,
                          _mm512_mask_or_epi64(y, low, _mm512_slli_epi64(y, 32), next));
      word += 4 * _mm_popcnt_u32(low);
      size = (U)_mm512_shuffle_i64x2((__m512i)size, (__m512i)size, 0x4E);
      rest = (U)_mm512_shuffle_i64x2((__m512i)rest, (__m512i)rest, 0x4E);
    }
    return word;
  }

  static std::uint32_t* put_all(std::uint64_t* states, const std::uint32_t* from,
                                const std::uint32_t* share, std::size_t tokens,
                                std::uint32_t* word) {
    for (std::size_t end = tokens; end > 0;) {
      const std::size_t begin = (end - 1) / 8 * 8;
      const auto used = __mmask8((1u << (end - begin)) - 1);
      const __m512i s = _mm512_cvtepu32_epi64(_mm256_maskz_loadu_epi32(used, share + begin));
      const __m512i f = _mm512_cvtepu32_epi64(_mm256_maskz_loadu_epi32(used, from + begin));
      __m512i x = _mm512_loadu_si512(states + begin);
      const auto full = __mmask8(used & ~_mm512_cmplt_epu64_mask(x, _mm512_slli_epi64(s, 39)));
      const int words = _mm_popcnt_u32(full);
      word -= words;
      _mm256_mask_storeu_epi32(word, __mmask8((1u << words) - 1),
                               _mm256_maskz_compress_epi32(full, _mm512_cvtepi64_epi32(x)));
      x = _mm512_mask_srli_epi64(x, full, x, 32);
      // The quotient has at most 39 bits, so it comes out right or, as less than one is taken off
      // it, one too small.
      const __m512d about = _mm512_div_pd(_mm512_cvtepu64_pd(x), _mm512_cvtepu64_pd(s));
      const __m512i q = _mm512_cvttpd_epi64(_mm512_sub_pd(about, _mm512_set1_pd(1.0 / 4096)));
      const __mmask8 small =
          _mm512_cmpge_epi64_mask(_mm512_sub_epi64(x, _mm512_mullo_epi64(q, s)), s);
      const __m512i rest = _mm512_sub_epi64(_mm512_set1_epi64(kCdf), s);
      x = _mm512_add_epi64(_mm512_add_epi64(x, f), _mm512_mullo_epi64(q, rest));
      _mm512_mask_storeu_epi64(states + begin, used, _mm512_mask_add_epi64(x, small, x, rest));
      end = begin;
    }
    return word;
  }

  // sums + w . x, x still with its 128: `start` has what it comes to.
  static I dot(I sums, I x, const std::int8_t* w) {
    std::int32_t four;
    std::memcpy(&four, w, 4);
    return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, _mm512_set1_epi32(four));
  }
  template <int N>
  static void products_of(const std::uint32_t* x, const std::int8_t* w, std::size_t groups,
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
      for (int v = 0; v < N; ++v) word[v] = _mm512_loadu_si512(x + g * kTile + v * W);
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
      for (int v = 0; v < N; ++v) _mm512_storeu_si512(sums[o] + t + v * W, sum[o][v]);
  }
  static constexpr bool kInOrder = false;
  static void products(const std::uint32_t* x, const std::int8_t* w, std::size_t groups,
                       std::size_t ahead, const Order*, const std::int32_t* start, std::size_t n,
                       std::int32_t sums[4][kTile]) {
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
};

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels k = VectorKernels<Avx512>::kernels();
  return k;
}

}  // namespace kvzip::predictive
