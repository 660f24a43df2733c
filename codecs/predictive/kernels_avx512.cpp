// AVX-512: sixteen tokens side by side, a density's whole table in eight registers.
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

  static std::uint64_t below(I a, I b) { return _mm512_cmplt_epu32_mask((__m512i)a, (__m512i)b); }
  static void pack(std::int32_t* to, std::uint64_t lanes, I v) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(lanes), (__m512i)v));
  }
  static I unpacked(const std::int32_t* from, std::uint64_t lanes) {
    return (I)_mm512_maskz_expand_epi32(__mmask16(lanes), _mm512_loadu_si512(from));
  }
  static I abs(I v) { return (I)_mm512_abs_epi32((__m512i)v); }
  static I least(I a, I b) { return (I)_mm512_min_epi32((__m512i)a, (__m512i)b); }
  static I most(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
  static F less(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
  static F reciprocal(F v) { return (F)_mm512_rcp14_ps((__m512)v); }
  static I low_halves(const std::uint64_t* x) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (I)_mm512_permutex2var_epi32(_mm512_loadu_si512(x), even, _mm512_loadu_si512(x + 8));
  }
  static Wide mul(I a, I b) { return (Wide)_mm512_mul_epi32((__m512i)a, (__m512i)b); }
  static I odd(I v) { return (I)_mm512_shuffle_epi32((__m512i)v, _MM_PERM_DDBB); }
  // 32 bits from bit S on of products of even and of odd lanes.
  template <int S>
  static I joined(Wide even, Wide odd) {
    return (I)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64((__m512i)even, S),
                                      _mm512_slli_epi64((__m512i)odd, 32 - S));
  }
  static I z(I a, I m, std::int32_t limit) {
    const __m512i most = _mm512_set1_epi64(limit);
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)a, (__m512i)m), 12);
    const __m512i other = _mm512_srli_epi64(_mm512_mul_epu32((__m512i)odd(a), (__m512i)odd(m)), 12);
    return (I)_mm512_mask_shuffle_epi32(_mm512_min_epu64(even, most), 0xAAAA,
                                        _mm512_min_epu64(other, most), _MM_PERM_CCAA);
  }

  // Tables stay in memory, from where permutations take them: registers are scarcer than loads.
  struct Table {
    const std::int32_t *from, *rise;
    Table(const Densities& d, std::size_t shape)
        : from(d.from + kCells * shape), rise(d.rise + kCells * shape) {}
    // A place's low bits say which register and where in it.
    static_assert(kFirstCell % kCells == 48);
    static constexpr int kNear = 32;  // cells of which `near` knows
    void near(I place, I* f, I* r) const {
      *f = (I)first32(from, (__m512i)place);
      *r = (I)first32(rise, (__m512i)place);
    }
    void at(I place, I* f, I* r) const {
      const auto c = (__m512i)place;
      const __mmask16 last = _mm512_cmpge_epi32_mask(c, _mm512_set1_epi32(kFirstCell + kNear));
      *f = (I)_mm512_mask_blend_epi32(last, first32(from, c), first32(from + 32, c));
      *r = (I)_mm512_mask_blend_epi32(last, first32(rise, c), first32(rise + 32, c));
    }
    static __m512i first32(const std::int32_t* a, __m512i place) {
      return _mm512_permutex2var_epi32(_mm512_loadu_si512(a + 16), place, _mm512_loadu_si512(a));
    }
  };
  struct Search {
    const float* a;
    Search(const Densities& d, std::size_t shape) : a(d.search + 4 * kSteps * shape) {}
    F at(I step, F x) const {
      const auto v = (__m512)x;
      __m512 sum = of(3, step);
      for (int i = 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, v, of(i, step));
      return (F)sum;
    }
    __m512 of(int i, I step) const {
      static_assert(kSteps == 32);
      return _mm512_permutex2var_ps(_mm512_loadu_ps(a + 32 * i), (__m512i)step,
                                    _mm512_loadu_ps(a + 32 * i + 16));
    }
  };
  static I at32(const std::int32_t* a, I at) {
    return (I)_mm512_permutex2var_epi32(_mm512_loadu_si512(a), (__m512i)at,
                                        _mm512_loadu_si512(a + 16));
  }

  static const std::uint8_t* advance(std::uint64_t* states, const std::int32_t* size,
                                     const std::int32_t* rest, const std::uint8_t* word) {
    for (int h = 0; h < 16; h += 8) {
      const auto wide = [&](const std::int32_t* p) {
        return _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)(p + h)));
      };
      const __m512i x = _mm512_srli_epi64(_mm512_loadu_si512(states + h), kCdfBits);
      const __m512i y = _mm512_add_epi64(_mm512_mullo_epi64(x, wide(size)), wide(rest));
      const __mmask8 low = _mm512_cmplt_epu64_mask(y, _mm512_set1_epi64(kLow));
      const __m512i next = _mm512_cvtepu32_epi64(
          _mm256_maskz_expand_epi32(low, _mm256_loadu_si256((const __m256i*)word)));
      _mm512_storeu_si512(states + h, _mm512_mask_or_epi64(y, low, _mm512_slli_epi64(y, 32), next));
      word += 4 * _mm_popcnt_u32(low);
    }
    return word;
  }

  // The states of a stream's tokens, eight in a register.
  struct States {
    static constexpr int kRegisters = kStream / 8;
    __m512i x[kRegisters];

    explicit States(const std::uint64_t* from) {
      for (int i = 0; i < kRegisters; ++i) x[i] = _mm512_loadu_si512(from + 8 * i);
    }
    void store(std::uint64_t* to) const {
      for (int i = 0; i < kRegisters; ++i) _mm512_storeu_si512(to + 8 * i, x[i]);
    }
    std::uint32_t* put(const std::uint32_t* from, const std::uint32_t* share, std::size_t tokens,
                       std::uint32_t* word) {
#pragma GCC unroll 4
      for (int i = kRegisters - 1; i >= 0; --i) {
        // Mostly all eight count: without masks these take a tenth less.
        if (tokens >= std::size_t(8 * i + 8)) {
          word = put_some(&x[i], _mm256_loadu_si256((const __m256i*)(from + 8 * i)),
                          _mm256_loadu_si256((const __m256i*)(share + 8 * i)), 255, word);
        } else if (tokens > std::size_t(8 * i)) {
          const auto used = __mmask8((1u << (tokens - 8 * i)) - 1);
          word = put_some(&x[i], _mm256_maskz_loadu_epi32(used, from + 8 * i),
                          _mm256_maskz_loadu_epi32(used, share + 8 * i), used, word);
        }
      }
      return word;
    }
    __attribute__((always_inline)) static std::uint32_t* put_some(__m512i* state, __m256i from,
                                                                  __m256i share, __mmask8 used,
                                                                  std::uint32_t* word) {
      const __m512i s = _mm512_cvtepu32_epi64(share), f = _mm512_cvtepu32_epi64(from);
      __m512i x = *state;
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
      const __m512i left = _mm512_sub_epi64(x, _mm512_mullo_epi64(q, s));
      const __mmask8 small = _mm512_cmpge_epi64_mask(left, s);
      x = _mm512_add_epi64(_mm512_add_epi64(_mm512_slli_epi64(q, kCdfBits), f), left);
      *state = _mm512_mask_add_epi64(x, small, x, _mm512_sub_epi64(_mm512_set1_epi64(kCdf), s));
      return word;
    }
  };
};

}  // namespace

const Kernels& avx512_kernels() {
  static const Kernels k = VectorKernels<Avx512>::kernels(avx512_vnni_products);
  return k;
}

}  // namespace kvzip::predictive
