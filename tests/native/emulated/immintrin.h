// AVX-512, VNNI and AMX for processors that have none: SIMDe's intrinsics in plain C++ take the
// place of the compiler's, and below is what the kernels use and SIMDe 0.7.4 lacks or has wrongly.
#pragma once
#pragma GCC system_header
#include_next <immintrin.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
// Functions that are not to be inlined wherever they are called, which compiles in half the time.
#include <simde/simde-common.h>
#undef SIMDE_FUNCTION_ATTRIBUTES
#define SIMDE_FUNCTION_ATTRIBUTES inline static
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

using U8 = std::uint8_t;
using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;
using I = simde__m512i;
using F = simde__m512;
using D = simde__m512d;

// The lanes of a vector V, each an L.
template <typename L, typename V = I>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(L);
  L of[kCount] = {};

  Lanes() = default;
  Lanes(const V& v) { std::memcpy(of, &v, sizeof v); }
  operator V() const {
    V v;
    std::memcpy(&v, of, sizeof v);
    return v;
  }
  L& operator[](int i) { return of[i]; }
};

inline bool has(U64 mask, int lane) { return mask >> lane & 1; }

template <typename L, typename Op>
U64 compare(Lanes<L> a, Lanes<L> b, const Op& op) {
  U64 mask = 0;
  for (int i = 0; i < a.kCount; ++i) mask |= U64(op(a[i], b[i])) << i;
  return mask;
}
template <typename L>
U64 less(I a, I b) {
  return compare<L>(a, b, [](L x, L y) { return x < y; });
}
template <typename L>
U64 no_bits(I a, I b) {
  return compare<L>(a, b, [](L x, L y) { return !(x & y); });
}

template <typename L, typename Op>
I each(Lanes<L> from, U64 mask, Lanes<L> a, Lanes<L> b, const Op& op) {
  for (int i = 0; i < a.kCount; ++i)
    if (has(mask, i)) from[i] = L(op(a[i], b[i]));
  return from;
}
template <typename L>
I subtract(I from, U64 mask, I a, I b) {
  return each<L>(from, mask, a, b, [](L x, L y) { return x - y; });
}

template <typename L>
I expand(Lanes<L> from, U64 mask, Lanes<L> a) {
  for (int i = 0, next = 0; i < a.kCount; ++i)
    if (has(mask, i)) from[i] = a[next++];
  return from;
}
template <typename L>
I compress(U64 mask, Lanes<L> a) {
  Lanes<L> to;
  for (int i = 0, next = 0; i < a.kCount; ++i)
    if (has(mask, i)) to[next++] = a[i];
  return to;
}

template <typename To, typename From, typename ToV, typename FromV>
ToV convert(FromV of) {
  Lanes<From, FromV> a(of);
  Lanes<To, ToV> to;
  for (int i = 0; i < to.kCount; ++i) to[i] = To(a[i]);
  return to;
}

template <typename L, typename V>
V load(U64 mask, const void* from) {
  Lanes<L, V> to;
  for (int i = 0; i < to.kCount; ++i)
    if (has(mask, i)) std::memcpy(&to[i], static_cast<const L*>(from) + i, sizeof(L));
  return to;
}
template <typename L, typename V>
void store(void* to, U64 mask, V of) {
  Lanes<L, V> a(of);
  for (int i = 0; i < a.kCount; ++i)
    if (has(mask, i)) std::memcpy(static_cast<L*>(to) + i, &a[i], sizeof(L));
}
inline simde__m256i expand_eight(U64 mask, Lanes<U32, simde__m256i> a) {
  Lanes<U32, simde__m256i> to;
  for (int i = 0, next = 0; i < a.kCount; ++i)
    if (has(mask, i)) to[i] = a[next++];
  return to;
}
inline I gather(Lanes<U32> at, const void* base, int scale) {
  for (U32& x : at.of)
    std::memcpy(&x, static_cast<const char*>(base) + std::ptrdiff_t(std::int32_t(x)) * scale, 4);
  return at;
}

inline I shift_in(I a, I b, int by) {
  return each<U32>(a, ~U64(0), a, b, [by](U32 x, U32 y) { return x << by | y >> (32 - by); });
}
inline I shift_right(I from, U64 mask, I a, unsigned by) {
  return each<U32>(from, mask, a, a, [by](U32 x, U32) { return x >> by; });
}
inline I shuffle_words(Lanes<U32> a, int order) {
  Lanes<U32> to;
  for (int i = 0; i < to.kCount; ++i) to[i] = a[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
  return to;
}
inline int sum(Lanes<U32> a) {
  U32 of = 0;
  for (U32 x : a.of) of += x;
  return int(of);
}

// Floating point rounded towards zero.
inline F to_floats(Lanes<U32> a) {
  Lanes<float, F> to;
  for (int i = 0; i < to.kCount; ++i) {
    const int more = a[i] >> 24 ? 8 - __builtin_clz(a[i]) : 0;  // bits than 24
    to[i] = float(a[i] >> more << more);
  }
  return to;
}
inline F divide(Lanes<float, F> a, Lanes<float, F> b) {
  for (int i = 0; i < a.kCount; ++i) {
    const double exact = double(a[i]) / double(b[i]);
    a[i] = float(exact);
    if (double(a[i]) > exact) a[i] = std::nextafter(a[i], 0.0f);
  }
  return a;
}

inline F reciprocal(Lanes<float, F> a) {
  for (float& of : a.of) of = 1 / of;
  return a;
}
// Where a quotient is no number nobody looks at it.
inline I to_whole(Lanes<double, D> a) {
  Lanes<std::int64_t> to;
  for (int i = 0; i < to.kCount; ++i) to[i] = std::fabs(a[i]) < 0x1p62 ? std::int64_t(a[i]) : 0;
  return to;
}
inline I shift_right_64(I from, U64 mask, I a, unsigned by) {
  return each<U64>(from, mask, a, a, [by](U64 x, U64) { return x >> by; });
}

// sums + four products of an unsigned and a signed byte each.
inline U32 products(U32 sum, U32 unsigned_bytes, U32 signed_bytes) {
  for (int i = 0; i < 32; i += 8)
    sum += (unsigned_bytes >> i & 255) * U32(std::int8_t(signed_bytes >> i));
  return sum;
}
inline __m256i products_of_eight(Lanes<U32, __m256i> sums, Lanes<U32, __m256i> a,
                                 Lanes<U32, __m256i> b) {
  for (int i = 0; i < sums.kCount; ++i) sums[i] = products(sums[i], a[i], b[i]);
  return sums;
}

// Two quarters of a, then two of b.
inline I quarters(Lanes<U64> a, Lanes<U64> b, int order) {
  Lanes<U64> to;
  for (int i = 0; i < 8; ++i) to[i] = (i < 4 ? a : b)[(order >> i / 2 * 2 & 3) * 2 + i % 2];
  return to;
}

// AMX, full tiles alone: 16 rows of 16 words.
struct Tile {
  U32 of[16][16];
};
inline thread_local Tile tiles[8];
inline thread_local bool tiles_are_there = false;
inline Tile& tile(int number) {
  if (!tiles_are_there) std::abort();
  return tiles[number];
}
inline void load_config(const void* config) {
  U8 wanted[64] = {1};
  for (int i = 0; i < 8; ++i) {
    wanted[16 + 2 * i] = 64;
    wanted[48 + i] = 16;
  }
  tiles_are_there = !std::memcmp(config, wanted, sizeof wanted);
}
inline void load_tile(int number, const void* from, std::size_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(tile(number).of[row], static_cast<const U8*>(from) + std::size_t(row) * stride, 64);
}
inline void store_tile(int number, void* to, std::size_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(static_cast<U8*>(to) + std::size_t(row) * stride, tile(number).of[row], 64);
}
// Signed bytes of a, unsigned ones of b.
inline void multiply_tiles(int sums, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        tile(sums).of[m][n] = products(tile(sums).of[m][n], tile(b).of[k][n], tile(a).of[m][k]);
}

}  // namespace emulated

#undef _cvtu32_mask32
#undef _cvtmask32_u32
#undef _mm512_madd_epi16
#undef _mm512_mask_cmpge_epu32_mask
#undef _mm512_div_round_ps
#undef _mm512_cvt_roundepu32_ps
#undef _mm512_cvt_roundepi32_ps
#undef _mm512_shldi_epi32
#undef _mm512_mask_shldi_epi32
#undef _mm512_mask_srli_epi32
#undef _mm512_i32gather_epi32
#undef _mm512_shuffle_epi32
#undef _mm512_mask_shuffle_epi32

#define _cvtu32_mask32(x) ((simde__mmask32)(x))
#define _cvtmask32_u32(x) ((unsigned)(x))
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_mask_cmpge_epu32_mask(mask, a, b) \
  ((simde__mmask16)((mask) & simde_mm512_cmpge_epu32_mask(a, b)))
#define _mm512_cmpgt_epu16_mask(a, b) ((simde__mmask32)emulated::less<emulated::U16>(b, a))
#define _mm512_cmplt_epu16_mask(a, b) ((simde__mmask32)emulated::less<emulated::U16>(a, b))
#define _mm512_cmpgt_epu32_mask(a, b) ((simde__mmask16)emulated::less<emulated::U32>(b, a))
#define _mm512_cmplt_epu32_mask(a, b) ((simde__mmask16)emulated::less<emulated::U32>(a, b))
#define _mm512_cmplt_epu64_mask(a, b) ((simde__mmask8)emulated::less<emulated::U64>(a, b))
#define _mm512_mask_cmplt_epu32_mask(mask, a, b) \
  ((simde__mmask16)((mask) & emulated::less<emulated::U32>(a, b)))
#define _mm512_mask_testn_epi16_mask(mask, a, b) \
  ((simde__mmask32)((mask) & emulated::no_bits<emulated::U16>(a, b)))
#define _mm512_mask_sub_epi16(from, mask, a, b) emulated::subtract<emulated::U16>(from, mask, a, b)
#define _mm512_maskz_sub_epi16(mask, a, b) \
  emulated::subtract<emulated::U16>(_mm512_setzero_si512(), mask, a, b)
#define _mm512_mask_expand_epi16(from, mask, a) emulated::expand<emulated::U16>(from, mask, a)
#define _mm512_maskz_expand_epi8(mask, a) \
  emulated::expand<emulated::U8>(_mm512_setzero_si512(), mask, a)
#define _mm512_maskz_compress_epi8(mask, a) emulated::compress<emulated::U8>(mask, a)
#define _mm512_maskz_compress_epi16(mask, a) emulated::compress<emulated::U16>(mask, a)
#define _mm512_cvtepi32_epi16(a) emulated::convert<emulated::U16, emulated::U32, __m256i>(a)
#define _mm512_cvtepu16_epi32(a) emulated::convert<emulated::U32, emulated::U16, __m512i>(a)
#define _mm512_cvtepu8_epi16(a) emulated::convert<emulated::U16, emulated::U8, __m512i>(a)
#define _mm512_cvtepu8_epi32(a) emulated::convert<emulated::U32, emulated::U8, __m512i>(a)
#define _mm512_cvtepu32_epi64(a) emulated::convert<emulated::U64, emulated::U32, __m512i>(a)
#define _mm512_cvtepu32_pd(a) emulated::convert<double, emulated::U32, emulated::D>(a)
#define _mm512_cvttpd_epu32(a) emulated::convert<emulated::U32, double, __m256i>(a)
#define _mm512_cvttps_epu32(a) emulated::convert<emulated::U32, float, __m512i>(a)
#define _mm512_maskz_loadu_epi8(mask, from) emulated::load<emulated::U8, __m512i>(mask, from)
#define _mm512_mask_storeu_epi8(to, mask, a) emulated::store<emulated::U8, __m512i>(to, mask, a)
#define _mm256_mask_storeu_epi16(to, mask, a) emulated::store<emulated::U16, __m256i>(to, mask, a)
#define _mm256_maskz_expand_epi32(mask, a) emulated::expand_eight(mask, a)
#define _mm512_i32gather_epi32 emulated::gather
#define _mm512_shldi_epi32 emulated::shift_in
#define _mm512_mask_shldi_epi32(from, mask, a, b, by) \
  simde_mm512_mask_mov_epi32(from, mask, emulated::shift_in(a, b, by))
#define _mm512_mask_srli_epi32 emulated::shift_right
#define _mm512_shuffle_epi32(a, order) emulated::shuffle_words(a, int(order))
#define _mm512_mask_shuffle_epi32(from, mask, a, order) \
  simde_mm512_mask_blend_epi32(mask, from, emulated::shuffle_words(a, int(order)))
#define _mm512_reduce_add_epi32 emulated::sum
#define _mm512_div_round_ps(a, b, rounding) emulated::divide(a, b)
#define _mm512_cvt_roundepu32_ps(a, rounding) emulated::to_floats(a)
#define _mm512_cvt_roundepi32_ps(a, rounding) emulated::to_floats(a)
#define _mm512_rcp14_ps(a) emulated::reciprocal(a)
#define _mm512_cvtepu64_pd(a) emulated::convert<double, emulated::U64, emulated::D>(a)
#define _mm512_cvttpd_epi64(a) emulated::to_whole(a)
#define _mm512_mask_srli_epi64(from, mask, a, by) emulated::shift_right_64(from, mask, a, by)
#define _mm512_maskz_loadu_epi32(mask, from) emulated::load<emulated::U32, __m512i>(mask, from)
#define _mm256_maskz_loadu_epi32(mask, from) emulated::load<emulated::U32, __m256i>(mask, from)
#define _mm256_mask_storeu_epi32(to, mask, a) emulated::store<emulated::U32, __m256i>(to, mask, a)
#define _mm512_mask_storeu_epi64(to, mask, a) emulated::store<emulated::U64, __m512i>(to, mask, a)
#define _mm256_dpbusd_avx_epi32 emulated::products_of_eight
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define _tile_loadconfig emulated::load_config
#define _tile_release() (emulated::tiles_are_there = false)
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_zero(number) (emulated::tile(number) = {})
#define _tile_dpbsud emulated::multiply_tiles
#define _mm512_shuffle_i64x2(a, b, order) emulated::quarters(a, b, order)
