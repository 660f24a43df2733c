// Formats of grids, and their widening.
#include "native/grid.hpp"

#include <algorithm>
#include <cstring>
#ifdef KVZIP_X86
#include <immintrin.h>
#endif

#include "native/grid_round.hpp"
#include "native/simd.hpp"

namespace kvzip::grid {
namespace {

constexpr Wide kBf16{8, 127, 16}, kFp16{11, 15, 16}, kFp32{24, 127, 32};

constexpr Narrow kNarrow[] = {
    // name, mantissa, step, sign, largest, infinity, nan, integer
    {"fp4_e2m1", 1, 1, 3, 7, -1, -1, false},
    {"int4", 3, 0, 3, 7, -1, -1, true},
    {"fp8_e5m2", 2, 16, 7, 0x7B, 0x7C, -1, false},
    {"fp8_e5m2fnuz", 2, 17, 7, 0x7F, -1, 0x80, false},
    {"fp8_e4m3fn", 3, 9, 7, 0x7E, -1, -1, false},
    {"fp8_e4m3fnuz", 3, 10, 7, 0x7F, -1, 0x80, false},
    {"int8", 7, 0, 7, 127, -1, -1, true},
};

// Where channels have scales of their own, so many are widened at a time.
constexpr std::size_t kChunk = 256;

// One run of neighbouring channels, in loops that compilers make vector code of: `Uniform` is one
// scale for all, at `significands[0]`. Returns whether some number is no normal one, or a code no
// number; the run is then wrong and is done again by widen_one.
template <typename T, int Precision, int Bias, bool Integer, bool ThroughFp32, bool Uniform>
__attribute__((always_inline)) inline bool widen_run(const Narrow& narrow,
                                                     const std::uint8_t* codes,
                                                     const std::uint32_t* significands,
                                                     const std::int32_t* exponents, std::size_t n,
                                                     T* out) {
  constexpr int kWidth = 8 * sizeof(T);
  constexpr std::uint32_t kExponents = (1u << (kWidth - Precision)) - 1;
  const int sign = narrow.sign, mantissa = narrow.mantissa;
  const std::uint32_t fraction = (1u << mantissa) - 1, magnitude = (1u << sign) - 1;
  const std::uint32_t largest = std::uint32_t(narrow.largest);
  const std::uint32_t nan = narrow.nan < 0 ? 0x100 : std::uint32_t(narrow.nan);
  std::uint32_t odd = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t code = codes[i];
    std::uint32_t negative, m;
    std::int32_t power;
    if (Integer) {
      const std::int32_t value = std::int32_t(code << (31 - sign)) >> (31 - sign);
      negative = std::uint32_t(value) >> 31;
      m = std::uint32_t(negative ? -value : value);
      power = 0;
    } else {
      const std::uint32_t index = code & magnitude;
      const std::uint32_t field = index >> mantissa, normal = field != 0;
      negative = (code >> sign) & 1;
      m = (index & fraction) | (normal << mantissa);
      power = std::int32_t(field - normal);
      odd |= std::uint32_t(index > largest) | std::uint32_t(code == nan);
    }
    // An integer of at most 8 bits is exact as a float, whose fields are its logarithm and itself
    // with the first bit at place 7.
    const float exact = float(std::int32_t(m));
    std::uint32_t fields;
    std::memcpy(&fields, &exact, sizeof fields);
    power += std::int32_t(fields >> 23) - 127;
    std::uint32_t product =
        (((fields >> 16) & 0x7F) | 0x80) * (Uniform ? significands[0] : significands[i]);
    const std::uint32_t carry = product >> 31;
    product = carry ? product : product << 1;
    const std::int32_t biased =
        (Uniform ? exponents[0] : exponents[i]) + 23 + Bias + power + std::int32_t(carry);
    std::uint32_t kept;
    if (ThroughFp32) {
      std::uint32_t once = product >> 8;
      once += ((product & 0xFF) + 0x7F + (once & 1)) >> 8;
      constexpr int kDrop = 24 - Precision > 0 ? 24 - Precision : 1;
      kept = once >> kDrop;
      kept += ((once & ((1u << kDrop) - 1)) + (1u << (kDrop - 1)) - 1 + (kept & 1)) >> kDrop;
    } else {
      constexpr int kDrop = 32 - Precision;
      kept = product >> kDrop;
      kept += ((product & ((1u << kDrop) - 1)) + (1u << (kDrop - 1)) - 1 + (kept & 1)) >> kDrop;
    }
    odd |= std::uint32_t(m != 0) & std::uint32_t(std::uint32_t(biased - 1) >= kExponents - 1);
    const std::uint32_t bits = (std::uint32_t(biased - 1) << (Precision - 1)) + kept;
    out[i] = T((m ? bits : 0) | (negative << (kWidth - 1)));
  }
  return odd != 0;
}

template <typename T>
using Run = bool (*)(const Narrow&, const std::uint8_t*, const std::uint32_t*, const std::int32_t*,
                     std::size_t, T*);

template <typename T, int P, int B, bool Integer, bool ThroughFp32, bool Uniform>
bool run_plain(const Narrow& narrow, const std::uint8_t* codes, const std::uint32_t* significands,
               const std::int32_t* exponents, std::size_t n, T* out) {
  return widen_run<T, P, B, Integer, ThroughFp32, Uniform>(narrow, codes, significands, exponents,
                                                           n, out);
}
#ifdef KVZIP_X86
// Under one scale a format of at most three bits of significand makes at most 8 significands: a
// table of 16 bytes, which one instruction looks 16 codes up in; and another for what is below the
// smallest normal code, where the significands are those of smaller numbers. Right while all codes
// make normal numbers. Does whole vectors only.
template <int Precision, int Bias, bool Integer, bool ThroughFp32>
__attribute__((target("avx2"))) bool look_up(const Narrow& narrow, std::uint32_t significand,
                                             std::int32_t exponent, const std::uint8_t* codes,
                                             std::size_t n, std::uint16_t* out) {
  const __m256i one = _mm256_set1_epi32(1);
  __m256i product = _mm256_mullo_epi32(_mm256_setr_epi32(128, 144, 160, 176, 192, 208, 224, 240),
                                       _mm256_set1_epi32(std::int32_t(significand)));
  const __m256i carry = _mm256_srli_epi32(product, 31);
  product = _mm256_sllv_epi32(product, _mm256_sub_epi32(one, carry));
  int drop = 32 - Precision;
  if (ThroughFp32) {
    const __m256i once = _mm256_srli_epi32(product, 8);
    const __m256i rest = _mm256_add_epi32(_mm256_and_si256(product, _mm256_set1_epi32(0xFF)),
                                          _mm256_and_si256(once, one));
    product = _mm256_add_epi32(
        once, _mm256_srli_epi32(_mm256_add_epi32(rest, _mm256_set1_epi32(0x7F)), 8));
    drop = 24 - Precision;
  }
  __m256i bits = _mm256_srli_epi32(product, drop);
  __m256i rest = _mm256_and_si256(product, _mm256_set1_epi32((1 << drop) - 1));
  rest = _mm256_add_epi32(rest, _mm256_and_si256(bits, one));
  rest = _mm256_add_epi32(rest, _mm256_set1_epi32((1 << (drop - 1)) - 1));
  bits = _mm256_add_epi32(bits, _mm256_srli_epi32(rest, drop));
  // Of the octave below the first normal code, since a normal code's exponent counts from 1.
  const int below = exponent + 23 + Bias + narrow.mantissa - 2;
  bits = _mm256_add_epi32(
      bits, _mm256_slli_epi32(_mm256_add_epi32(carry, _mm256_set1_epi32(below)), Precision - 1));
  const __m128i octave =
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  const __m256i normal = _mm256_broadcastsi128_si256(octave);
  // 0, 1/8 ... 7/8: nothing, then the significands 8, 8, 12, 8, 10, 12, 14, so many octaves lower.
  const __m128i lower = _mm_sub_epi16(
      _mm_shuffle_epi8(octave, _mm_setr_epi8(-1, -1, 0, 1, 0, 1, 8, 9, 0, 1, 4, 5, 8, 9, 12, 13)),
      _mm_slli_epi16(_mm_setr_epi16(0, 2, 1, 1, 0, 0, 0, 0), Precision - 1));
  const __m256i small = _mm256_broadcastsi128_si256(lower);

  const __m256i zero = _mm256_setzero_si256();
  const __m256i magnitude = _mm256_set1_epi16(std::int16_t((1 << narrow.sign) - 1));
  const __m256i fraction = _mm256_set1_epi16(std::int16_t((1 << narrow.mantissa) - 1));
  const __m256i largest = _mm256_set1_epi16(std::int16_t(narrow.largest));
  const __m256i nan = _mm256_set1_epi16(std::int16_t(narrow.nan));
  const __m128i mantissa = _mm_cvtsi32_si128(narrow.mantissa);
  const __m128i to_eighths = _mm_cvtsi32_si128(3 - narrow.mantissa);
  const __m128i to_sign = _mm_cvtsi32_si128(15 - narrow.sign);
  __m256i odd = zero;
  for (std::size_t i = 0; i + 16 <= n; i += 16) {
    const __m256i code =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i shifted = _mm256_sll_epi16(code, to_sign);
    __m256i index;
    if (Integer) {
      index = _mm256_abs_epi16(_mm256_sra_epi16(shifted, to_sign));
    } else {
      index = _mm256_and_si256(code, magnitude);
      odd = _mm256_or_si256(
          odd, _mm256_or_si256(_mm256_cmpgt_epi16(index, largest), _mm256_cmpeq_epi16(code, nan)));
    }
    const __m256i field = _mm256_srl_epi16(index, mantissa);
    const __m256i eighths = _mm256_sll_epi16(_mm256_and_si256(index, fraction), to_eighths);
    // Bytes 2e and 2e + 1 of a table are number e.
    const __m256i place = _mm256_add_epi16(_mm256_mullo_epi16(eighths, _mm256_set1_epi16(0x0202)),
                                           _mm256_set1_epi16(0x0100));
    const __m256i large = _mm256_add_epi16(_mm256_shuffle_epi8(normal, place),
                                           _mm256_slli_epi16(field, Precision - 1));
    const __m256i number = _mm256_blendv_epi8(large, _mm256_shuffle_epi8(small, place),
                                              _mm256_cmpeq_epi16(field, zero));
    const __m256i sign = _mm256_and_si256(shifted, _mm256_set1_epi16(std::int16_t(0x8000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_or_si256(number, sign));
  }
  return !_mm256_testz_si256(odd, odd);
}

template <typename T, int P, int B, bool Integer, bool ThroughFp32, bool Uniform>
__attribute__((target("avx2"))) bool run_avx2(const Narrow& narrow, const std::uint8_t* codes,
                                              const std::uint32_t* significands,
                                              const std::int32_t* exponents, std::size_t n,
                                              T* out) {
  std::size_t done = 0;
  bool odd = false;
  if constexpr (Uniform && sizeof(T) == 2) {
    const Magnitude largest = magnitude(narrow, std::uint32_t(narrow.largest));
    const int first = exponents[0] + 23 + B;  // the exponent's field of the smallest step
    const int last = first + bit_length(largest.significand) + largest.power + 1;
    if (narrow.mantissa <= 3 && n >= 16 && first >= 1 && last < (1 << (16 - P)) - 1) {
      odd =
          look_up<P, B, Integer, ThroughFp32>(narrow, significands[0], exponents[0], codes, n, out);
      done = n / 16 * 16;
      if (done == n) return odd;
    }
  }
  return widen_run<T, P, B, Integer, ThroughFp32, Uniform>(
             narrow, codes + done, significands + (Uniform ? 0 : done),
             exponents + (Uniform ? 0 : done), n - done, out + done) ||
         odd;
}
#endif

template <typename T, int P, int B, bool Integer, bool ThroughFp32, bool Uniform>
Run<T> choose_level() {
#ifdef KVZIP_X86
  if (simd::vectors() != simd::Level::scalar)
    return run_avx2<T, P, B, Integer, ThroughFp32, Uniform>;
#endif
  return run_plain<T, P, B, Integer, ThroughFp32, Uniform>;
}

template <typename T, int P, int B, bool Integer>
Run<T> choose_run(bool through_fp32, bool uniform) {
  // A product that is rounded to fp32 is an fp32 number already.
  if (through_fp32 && P < 24)
    return uniform ? choose_level<T, P, B, Integer, true, true>()
                   : choose_level<T, P, B, Integer, true, false>();
  return uniform ? choose_level<T, P, B, Integer, false, true>()
                 : choose_level<T, P, B, Integer, false, false>();
}

template <typename T, int P, int B>
Run<T> choose_run(bool integer, bool through_fp32, bool uniform) {
  return integer ? choose_run<T, P, B, true>(through_fp32, uniform)
                 : choose_run<T, P, B, false>(through_fp32, uniform);
}

Run<std::uint16_t> choose_run(std::uint16_t, const Wide& wide, bool integer, bool through_fp32,
                              bool uniform) {
  return wide.precision == kBf16.precision ? choose_run<std::uint16_t, kBf16.precision, kBf16.bias>(
                                                 integer, through_fp32, uniform)
                                           : choose_run<std::uint16_t, kFp16.precision, kFp16.bias>(
                                                 integer, through_fp32, uniform);
}

Run<std::uint32_t> choose_run(std::uint32_t, const Wide&, bool integer, bool through_fp32,
                              bool uniform) {
  return choose_run<std::uint32_t, kFp32.precision, kFp32.bias>(integer, through_fp32, uniform);
}

}  // namespace

const Wide* find_wide(const char* name) {
  if (!std::strcmp(name, "bf16")) return &kBf16;
  if (!std::strcmp(name, "fp16")) return &kFp16;
  if (!std::strcmp(name, "fp32")) return &kFp32;
  return nullptr;
}

const Narrow* find_narrow(const char* name) {
  for (const Narrow& narrow : kNarrow)
    if (!std::strcmp(name, narrow.name)) return &narrow;
  return nullptr;
}

bool read(ScaleFormat format, std::uint32_t bits, Scale& scale) {
  if (format == ScaleFormat::e8m0) {
    scale = {1u << 23, std::int32_t(bits) - 127 - 23};
    return bits < 0xFF;
  }
  if (format == ScaleFormat::bf16) bits <<= 16;
  const std::uint32_t biased = bits >> 23;  // with the sign bit, so that no negative one passes
  scale = {(bits & 0x7FFFFF) | 0x800000, std::int32_t(biased) - 127 - 23};
  return biased >= 1 && biased <= 254;
}

template <typename T>
void widen(const Wide& wide, const Narrow& narrow, Rounding rounding, const Shape& shape,
           const std::uint8_t* codes, const Scale* scales, std::size_t part_scale_rows,
           std::size_t first_token, T* out, std::ptrdiff_t row_stride,
           std::ptrdiff_t token_stride) {
  if (!shape.channels) return;
  const std::size_t columns = shape.scale_columns();
  const bool uniform = shape.group_channels >= 16 || shape.group_channels >= shape.channels;
  const Run<T> run =
      choose_run(T(), wide, narrow.integer, rounding == Rounding::through_fp32, uniform);
  std::uint32_t significands[kChunk];
  std::int32_t exponents[kChunk];
  const std::size_t width = uniform ? shape.group_channels : kChunk;
  for (std::size_t row = 0; row < shape.rows; ++row) {
    const Scale* of_row = scales + row * part_scale_rows * columns;
    for (std::size_t token = 0; token < shape.tokens;) {
      // The tokens from here on that share their scales.
      const std::size_t group = (first_token + token) / shape.group_tokens;
      const std::size_t offset = (first_token + token) % shape.group_tokens;
      const std::size_t last = token + std::min(shape.group_tokens - offset, shape.tokens - token);
      for (std::size_t begin = 0; begin < shape.channels;) {
        const std::size_t n = std::min(width, shape.channels - begin);
        for (std::size_t i = 0; i < (uniform ? 1 : n); ++i) {
          const Scale& scale = of_row[group * columns + (begin + i) / shape.group_channels];
          significands[i] = scale.significand;
          exponents[i] = scale.exponent - narrow.step;
        }
        for (std::size_t t = token; t < last; ++t) {
          const std::uint8_t* from = codes + (row * shape.tokens + t) * shape.channels + begin;
          T* to = out + std::ptrdiff_t(row) * row_stride + std::ptrdiff_t(t) * token_stride + begin;
          if (run(narrow, from, significands, exponents, n, to))
            for (std::size_t i = 0; i < n; ++i)
              to[i] = T(widen_one(wide, narrow, rounding, from[i],
                                  {significands[uniform ? 0 : i], exponents[uniform ? 0 : i]}));
        }
        begin += n;
      }
      token = last;
    }
  }
}

template void widen(const Wide&, const Narrow&, Rounding, const Shape&, const std::uint8_t*,
                    const Scale*, std::size_t, std::size_t, std::uint16_t*, std::ptrdiff_t,
                    std::ptrdiff_t);
template void widen(const Wide&, const Narrow&, Rounding, const Shape&, const std::uint8_t*,
                    const Scale*, std::size_t, std::size_t, std::uint32_t*, std::ptrdiff_t,
                    std::ptrdiff_t);

}  // namespace kvzip::grid
