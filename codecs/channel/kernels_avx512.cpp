// AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, VPOPCNTDQ): a channel's whole table in four registers, the
// states of all lanes in eight.
#include <immintrin.h>

#include <utility>

#include "channel/isa_kernels.hpp"
#include "channel/scalar_steps.hpp"

namespace kvzip::channel {
namespace {

// 16 x 16 words of 32 bits, rows to columns.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  // r[4q + k]: of rows 4q to 4q+3, column k of each quarter.
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm512_shuffle_i32x4(r[k], r[4 + k], 0x88);
    t[4 + k] = _mm512_shuffle_i32x4(r[k], r[4 + k], 0xDD);
    t[8 + k] = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0x88);
    t[12 + k] = _mm512_shuffle_i32x4(r[8 + k], r[12 + k], 0xDD);
  }
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0x88);
    r[8 + k] = _mm512_shuffle_i32x4(t[k], t[8 + k], 0xDD);
    r[4 + k] = _mm512_shuffle_i32x4(t[4 + k], t[12 + k], 0x88);
    r[12 + k] = _mm512_shuffle_i32x4(t[4 + k], t[12 + k], 0xDD);
  }
}

constexpr int kVectors = kLanes / 16;

// 0, 1, 2, ...
struct Bytes {
  constexpr Bytes() {
    for (int i = 0; i < 64; ++i) of[i] = std::uint8_t(i);
  }
  alignas(64) std::uint8_t of[64] = {};
};
constexpr Bytes kBytes;

struct Avx512 {
  template <typename T>
  using Decoded = Tile<T>;

  class Lanes {
   public:
    explicit Lanes(const std::uint32_t* states) {
      for (int v = 0; v < kVectors; ++v) x_[v] = _mm512_load_si512(states + 16 * v);
    }

    void store(std::uint32_t* states) const {
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(states + 16 * v, x_[v]);
    }

    void limit(std::size_t lanes) {
      for (int v = 0; v < kVectors; ++v) {
        const std::size_t first = 16 * std::size_t(v);
        active_[v] = __mmask16(lanes <= first ? 0 : first_ones(least(16, lanes - first)));
        upper_[v] = _cvtu32_mask32(_pdep_u32(active_[v], kUpper));
      }
      limited_ = true;
    }

    template <typename T, int M>
    bool strip(StripWork<T>& work) {
      return limited_ ? strip<T, M, true>(work) : strip<T, M, false>(work);
    }

   private:
    template <typename T, int M, bool limited>
    bool strip(StripWork<T>& work) {
      __m512i x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = x_[v];
      const std::uint8_t* at = work.words->at;
      std::uint64_t escaped = 0;
      for (std::size_t c = 0; c < work.width; c += Tile<T>::kInWord)
        if (!word<T, M, limited>(work, c, x, at, escaped,
                                 std::make_index_sequence<Tile<T>::kInWord>()))
          return false;
      work.words->at = at;
      for (int v = 0; v < kVectors; ++v) x_[v] = x[v];
      for (; escaped; escaped &= escaped - 1)
        find<T, M>(std::size_t(__builtin_ctzll(escaped)), work);
      return true;
    }

    // The lanes in which a channel's values are escapes: their bit is in the tile, below the value.
    template <typename T, int M>
    void find(std::size_t c, StripWork<T>& work) {
      typename StripWork<T>::Escaped& escaped = work.escaped[work.escaped_count++];
      escaped = {c, {}};
      const __m512i bit = _mm512_set1_epi32(1 << (Tile<T>::template shift<M>(c) - 1));
      for (int v = 0; v < kVectors; ++v) {
        const __m512i found = _mm512_load_si512(work.tile->column(c) + 16 * v);
        escaped.lanes[v / 4] |= std::uint64_t(_mm512_mask_test_epi32_mask(active_[v], found, bit))
                                << 16 * (v % 4);
      }
    }

    // The channels that share a word of the tile.
    template <typename T, int M, bool limited, std::size_t... in_word>
    __attribute__((always_inline)) bool word(StripWork<T>& work, std::size_t c,
                                             __m512i (&x)[kVectors], const std::uint8_t*& at,
                                             std::uint64_t& escaped,
                                             std::index_sequence<in_word...>) {
      return (step<T, M, limited, in_word>(work, c + in_word, x, at, escaped) && ...);
    }

    template <typename T, int M, bool limited, int in_word>
    __attribute__((always_inline)) bool step(StripWork<T>& work, std::size_t c,
                                             __m512i (&x)[kVectors], const std::uint8_t*& at,
                                             std::uint64_t& escaped) {
      if (in_word && c >= work.width) return true;
      work.template fetch<M>(c, at);
      if (!(work.live >> c & 1)) return true;
      const std::uint8_t* p = work.words->ready(at);
      if (!p) return false;
      constexpr int kShift = Tile<T>::template shift<M>(in_word);
      const __m512i keep =
          _mm512_set1_epi32(int((2 * (std::uint32_t(T(-1)) >> M) + 1) << (kShift - 1)));
      const __m512i ones = _mm512_set1_epi32(-1);
      const __m512i low = _mm512_set1_epi32(int(kLow));
      const Decoder& d = work.decoders[work.channels[c].shape];
      const __m512i own_low = _mm512_load_si512(d.entry),
                    own_high = _mm512_load_si512(d.entry + 16);
      const __m512i other_low = _mm512_load_si512(d.entry + 32),
                    other_high = _mm512_load_si512(d.entry + 48);
      std::uint32_t* const out = work.tile->column(c);
      __m512i all = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const __m512i bucket = _mm512_srli_epi32(x[v], 5);  // permutations look at 5 bits of it
        const __m512i own = _mm512_permutex2var_epi32(own_low, bucket, own_high);
        const __m512i other = _mm512_permutex2var_epi32(other_low, bucket, other_high);
        const __m512i place = _mm512_and_si512(x[v], _mm512_set1_epi32(kBucketSlots - 1));
        const __mmask16 second = _mm512_cmpge_epu32_mask(_mm512_shldi_epi32(x[v], ones, 27), own);
        const __m512i e = _mm512_mask_blend_epi32(second, own, other);
        const __m512i rank =
            _mm512_mask_add_epi32(place, second, place, _mm512_srli_epi32(other, kAddAt));
        const __m512i freq = _mm512_and_si512(e, _mm512_set1_epi32(int(kFreqMask)));
        const __m512i y =
            _mm512_add_epi32(_mm512_mullo_epi32(freq, _mm512_srli_epi32(x[v], kProbBits)), rank);
        // A lane takes a word where the upper half is zero. The word is put there, and the halves
        // change places.
        const __mmask16 takes = limited ? _mm512_mask_cmplt_epu32_mask(active_[v], y, low)
                                        : _mm512_cmplt_epu32_mask(y, low);
        const __mmask32 upper =
            _mm512_mask_testn_epi16_mask(limited ? upper_[v] : _cvtu32_mask32(kUpper), y, y);
        const __m512i words =
            _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        p += 2 * std::size_t(__builtin_popcount(_cvtmask32_u32(upper)));
        const __m512i next = limited ? _mm512_mask_mov_epi32(x[v], active_[v], y) : y;
        const __m512i filled = _mm512_mask_expand_epi16(next, upper, words);
        x[v] = _mm512_mask_rol_epi32(filled, takes, filled, 16);
        all = _mm512_or_si512(all, e);
        const __m512i turned = kShift < kValueAt ? _mm512_srli_epi32(e, kValueAt - kShift)
                                                 : _mm512_slli_epi32(e, kShift - kValueAt);
        std::uint32_t* const o = out + 16 * v;
        // (turned & keep) | what is there
        _mm512_store_si512(
            o, in_word ? _mm512_ternarylogic_epi32(turned, keep, _mm512_load_si512(o), 0xEA)
                       : _mm512_and_si512(turned, keep));
      }
      at = p;
      const bool any = _mm512_test_epi32_mask(all, _mm512_set1_epi32(int(kEscapeBit))) != 0;
      escaped |= std::uint64_t(any) << c;
      return true;
    }

    __m512i x_[kVectors];
    static constexpr std::uint32_t kUpper = 0xAAAAAAAA;  // the upper half of each lane
    __mmask32 upper_[kVectors];
    __mmask16 active_[kVectors] = {0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF};
    bool limited_ = false;
  };

  // The 16, 32 or 64 bytes of a row that belong to part `part` of a row of numbers, widened.
  template <typename T>
  static __m512i widen(const std::uint8_t* row, int part) {
    const std::uint8_t* p = row + part * int(kStrip / sizeof(T));
    if constexpr (sizeof(T) == 1) return _mm512_loadu_si512(p);
    else if constexpr (sizeof(T) == 2)
      return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    else return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static __m512i add(__m512i a, __m512i b) {
    if constexpr (sizeof(T) == 1) return _mm512_add_epi8(a, b);
    else if constexpr (sizeof(T) == 2) return _mm512_add_epi16(a, b);
    else return _mm512_add_epi32(a, b);
  }

  template <typename T, int M>
  static void merge(const Tile<T>& tile, std::size_t token, std::size_t count, const T* base,
                    const std::uint8_t* mantissas, T* corner, std::ptrdiff_t stride,
                    std::size_t width) {
    constexpr int R = M % 8, B = M / 8;
    alignas(64) std::uint8_t fields[16][kStrip];
    const std::uint8_t* const octets[2] = {mantissas, mantissas + rows_of_octet(M) * kStrip};
    for (std::size_t o = 0; o < count; o += 8)
      unpack<R>(octets[o / 8] + 8 * B * kStrip, fields + o);
    for (int part = 0; part < int(sizeof(T)); ++part) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile.word[16 * part + i] + token);
      transpose(r);
      const __m512i bases = _mm512_load_si512(reinterpret_cast<const char*>(base) + 64 * part);
      const __mmask64 there = first_ones(width * sizeof(T) > 64 * std::size_t(part)
                                             ? least(64, width * sizeof(T) - 64 * std::size_t(part))
                                             : 0);
      const auto row = [&](int i) {
        __m512i m = widen<T>(fields[i], part);
        if constexpr (sizeof(T) == 2 && B) m = _mm512_slli_epi16(m, 8);
        if constexpr (sizeof(T) == 4) m = _mm512_slli_epi32(m, 16);
        for (int j = 0; j < B; ++j) {
          const __m512i low = widen<T>(octets[i / 8] + (8 * j + i % 8) * kStrip, part);
          m = _mm512_or_si512(m, j ? _mm512_slli_epi32(low, 8) : low);
        }
        return _mm512_or_si512(add<T>(r[i], bases), m);
      };
      char* out = reinterpret_cast<char*>(corner) + 64 * part;
      if (count == 16 && there == first_ones(64)) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          _mm512_storeu_si512(out + i * stride * std::ptrdiff_t(sizeof(T)), row(i));
      } else {
        for (int i = 0; i < int(count); ++i)
          _mm512_mask_storeu_epi8(out + i * stride * std::ptrdiff_t(sizeof(T)), there, row(i));
      }
    }
  }

  class EncoderLanes {
   public:
    void load(const std::uint32_t* states) {
      for (int v = 0; v < kVectors; ++v) x_[v] = _mm512_loadu_si512(states + 16 * v);
    }
    void store(std::uint32_t* states) const {
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(states + 16 * v, x_[v]);
    }

    bool step(const Encoder& e, std::uint32_t base, int value_bits, const std::uint32_t* column,
              int shift, std::size_t lanes, Sink* sink) {
      if (e.width > 32)
        return step<Cells::kMemory>(e, base, value_bits, column, shift, lanes, sink);
      // Most shapes are no wider than 16.
      return e.width > 16 || value_bits < 5
                 ? step<Cells::kTwoPairs>(e, base, value_bits, column, shift, lanes, sink)
                 : step<Cells::kOnePair>(e, base, value_bits, column, shift, lanes, sink);
    }

   private:
    // Where the cells of a shape's exponents are looked up: a pair of registers has those of 16
    // exponents of either sign, or of 32 of one.
    enum class Cells { kOnePair, kTwoPairs, kMemory };

    template <Cells in>
    bool step(const Encoder& e, std::uint32_t base, int value_bits, const std::uint32_t* column,
              int shift, std::size_t lanes, Sink* sink) {
      const std::uint32_t exponents = 1u << (value_bits - 1);
      const __m512i mask = _mm512_set1_epi32(int(2 * exponents - 1));
      const __m512i sign = _mm512_set1_epi32(int(exponents));
      const __m512i exponent = _mm512_set1_epi32(int(exponents - 1));
      const __m512i bases = _mm512_set1_epi32(int(base));
      const __m512i right = _mm512_set1_epi32(shift);
      const __m512i one = _mm512_set1_epi32(1);
      const std::uint32_t* negative = e.cell + exponents;
      const __m512i cells[4] = {_mm512_loadu_si512(e.cell), _mm512_loadu_si512(e.cell + 16),
                                _mm512_loadu_si512(negative), _mm512_loadu_si512(negative + 16)};
      const __m512i begins[2] = {_mm512_loadu_si512(e.begins), _mm512_loadu_si512(e.begins + 16)};
      const __m512i before[2] = {_mm512_loadu_si512(e.before), _mm512_loadu_si512(e.before + 16)};
      const __m512i shifts[2] = {_mm512_loadu_si512(e.shift), _mm512_loadu_si512(e.shift + 32)};
      const __m512i outside = _mm512_set1_epi32(int(e.outside));
      const __m512i beyond = _mm512_set1_epi32(int((exponents - 1) & ~15u));
      const __m512i to_bit_4 = _mm512_set1_epi32(value_bits - 5);
      std::uint16_t* words = sink->words;
      for (int v = kVectors; v-- > 0;) {
        const std::size_t first = 16 * std::size_t(v);
        if (lanes <= first) continue;
        const auto active = __mmask16(first_ones(least(16, lanes - first)));
        const __m512i number = _mm512_srlv_epi32(_mm512_load_si512(column + first), right);
        const __m512i relative = _mm512_and_si512(_mm512_sub_epi32(number, bases), mask);
        __m512i cell;
        if constexpr (in == Cells::kMemory) {
          cell = _mm512_i32gather_epi32(relative, e.cell, 4);
        } else if constexpr (in == Cells::kTwoPairs) {
          const __m512i at = _mm512_and_si512(relative, exponent);
          cell = _mm512_mask_blend_epi32(_mm512_test_epi32_mask(relative, sign),
                                         _mm512_permutex2var_epi32(cells[0], at, cells[1]),
                                         _mm512_permutex2var_epi32(cells[2], at, cells[3]));
          cell = _mm512_mask_mov_epi32(cell, _mm512_cmpgt_epu32_mask(at, _mm512_set1_epi32(31)),
                                       outside);
        } else {
          // Bit 4 of where it is looked up is the sign.
          const __m512i at = _mm512_ternarylogic_epi32(
              _mm512_set1_epi32(16), _mm512_srlv_epi32(relative, to_bit_4), relative, 0xCA);
          cell = _mm512_permutex2var_epi32(cells[0], at, cells[2]);
          cell = _mm512_mask_mov_epi32(cell, _mm512_test_epi32_mask(relative, beyond), outside);
        }
        const __mmask16 special = _mm512_mask_test_epi32_mask(
            active, cell, _mm512_set1_epi32(int(kEscapeCell | kNoCell)));
        if (__builtin_expect(special, 0)) {
          if (e.outside & kNoCell) return false;
          alignas(64) std::uint32_t values[16];
          _mm512_store_si512(values, _mm512_and_si512(number, mask));
          for (int j = 16; j-- > 0;)
            if (special >> j & 1) *--sink->escapes = std::uint16_t(values[j]);
        }
        const __m512i freq = _mm512_and_si512(cell, _mm512_set1_epi32(int(kFreqMask)));
        __m512i x = x_[v];
        const __mmask16 full = _mm512_mask_cmpge_epu32_mask(active, _mm512_srli_epi32(x, 22), freq);
        const auto gives = std::uint32_t(full);
        const auto count = std::size_t(__builtin_popcount(gives));
        words -= count;
        const __mmask32 low_halves = _cvtu32_mask32(_pdep_u32(gives, 0x55555555));
        _mm256_mask_storeu_epi16(
            words, __mmask16(first_ones(count)),
            _mm512_castsi512_si256(_mm512_maskz_compress_epi16(low_halves, x)));
        x = _mm512_mask_srli_epi32(x, full, x, 16);
        // x / freq is below 2^22. Rounded down twice in 24 bits it comes out right or 1 too small.
        constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
        __m512i q = _mm512_cvttps_epu32(_mm512_div_round_ps(
            _mm512_cvt_roundepu32_ps(x, kDown), _mm512_cvt_roundepi32_ps(freq, kDown), kDown));
        __m512i rank = _mm512_sub_epi32(x, _mm512_mullo_epi32(q, freq));
        const __mmask16 more = _mm512_cmpge_epu32_mask(rank, freq);
        q = _mm512_mask_add_epi32(q, more, q, one);
        rank = _mm512_mask_sub_epi32(rank, more, rank, freq);
        // Of a place only its ten lowest bits are looked at: above them is the rest of the cell.
        const __m512i place = _mm512_add_epi32(_mm512_srli_epi32(cell, kStartAt), rank);
        const __m512i group = _mm512_srli_epi32(place, 5);
        const __m512i begun =
            _mm512_sllv_epi32(_mm512_permutex2var_epi32(begins[0], group, begins[1]),
                              _mm512_andnot_si512(place, _mm512_set1_epi32(31)));
        const __m512i piece = _mm512_add_epi32(
            _mm512_permutex2var_epi32(before[0], group, before[1]), _mm512_popcnt_epi32(begun));
        const __m512i slot =
            _mm512_add_epi32(place, _mm512_permutex2var_epi16(shifts[0], piece, shifts[1]));
        x_[v] = _mm512_mask_shldi_epi32(x_[v], active, q, _mm512_slli_epi32(slot, 32 - kProbBits),
                                        kProbBits);
      }
      sink->words = words;
      return true;
    }

    __m512i x_[kVectors] = {};
  };

  template <typename T>
  static void columns(const T (*rows)[kStrip], std::size_t token, Tile<T>& tile) {
    for (int part = 0; part < int(sizeof(T)); ++part) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = _mm512_load_si512(reinterpret_cast<const char*>(rows[i]) + 64 * part);
      transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(tile.word[16 * part + i] + token, r[i]);
    }
  }

  static void collect(const std::uint8_t* row, std::uint64_t live, std::size_t live_count,
                      std::uint8_t* out) {
    _mm512_mask_storeu_epi8(out, first_ones(live_count),
                            _mm512_maskz_compress_epi8(live, _mm512_loadu_si512(row)));
  }

  static void spread(const std::uint8_t* rows, std::size_t count, std::uint64_t live,
                     std::size_t live_count, std::uint8_t* out) {
    for (std::size_t i = 0; i < count; ++i, rows += live_count) {
      const __m512i row = _mm512_maskz_loadu_epi8(first_ones(live_count), rows);
      _mm512_store_si512(out + kStrip * i, _mm512_maskz_expand_epi8(live, row));
    }
  }
};

}  // namespace

KVZIP_KERNELS(avx512, Avx512)

// --- a shape's table; 32 symbols are the words of one register -----------------------------------

namespace avx512 {
namespace {

inline __m512i widened(__m512i words, int half) {
  return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(words, 1)
                                    : _mm512_castsi512_si256(words));
}
inline __m512i joined(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Sums of all words up to and with each one.
inline __m512i running_sum(__m512i x, __m512i places) {
#pragma GCC unroll 5
  for (int by = 1; by < kBuckets; by *= 2) {
    const __m512i before = _mm512_sub_epi16(places, _mm512_set1_epi16(short(by)));
    x = _mm512_add_epi16(x, _mm512_maskz_permutexvar_epi16(~__mmask32(0) << by, before, x));
  }
  return x;
}

struct Symbols {
  __m512i freq, value;  // words; 0 where there is none
  __mmask32 escape;
};

Symbols symbols_of(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                   int exponent_bits, __m512i places) {
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i bytes = _mm512_load_si512(kBytes.of);
  const __m512i all = _mm512_maskz_loadu_epi8(first_ones(2 * width), levels);
  const __mmask64 there = _mm512_test_epi8_mask(all, all);
  const std::uint64_t count = std::uint64_t(__builtin_popcountll(there));
  Symbols s;
  s.escape = __mmask32(std::uint64_t(escape_level != 0) << count);
  const auto words = [&](__m512i of) {
    return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(_mm512_maskz_compress_epi8(there, of)));
  };
  const __m512i level =
      _mm512_mask_mov_epi16(words(all), s.escape, _mm512_set1_epi16(escape_level));
  const __m512i at = words(bytes);  // 2 * exponent + sign
  s.value = _mm512_or_si512(
      _mm512_srli_epi16(at, 1),
      _mm512_sll_epi16(_mm512_and_si512(at, one), _mm_cvtsi32_si128(exponent_bits)));
  // A quotient that is no whole number is at least 1 / 2^23 away from one, so the division of
  // doubles never gives another whole part.
  const __m512i weight = _mm512_mullo_epi16(level, level);
  const __m512d total = _mm512_set1_pd(_mm512_reduce_add_epi32(_mm512_madd_epi16(level, level)));
  const auto scaled = [&](__m256i weights) {
    const __m512d w = _mm512_cvtepu32_pd(weights);
    return _mm512_cvttpd_epu32(
        _mm512_div_pd(_mm512_add_pd(_mm512_mul_pd(w, _mm512_set1_pd(2 * kTotal)), total),
                      _mm512_add_pd(total, total)));
  };
  __m256i halves[2];
  for (int h = 0; h < 2; ++h) {
    const __m512i w = widened(weight, h);
    halves[h] = _mm512_cvtepi32_epi16(
        joined(scaled(_mm512_castsi512_si256(w)), scaled(_mm512_extracti64x4_epi64(w, 1))));
  }
  s.freq = _mm512_maskz_max_epu16(_mm512_test_epi16_mask(level, level),
                                  joined(halves[0], halves[1]), one);
  const int sum = _mm512_reduce_add_epi32(_mm512_madd_epi16(s.freq, one));
  // The first of the greatest: the least of all ones less (frequency, 31 - place).
  const __m512i order =
      _mm512_sub_epi16(places, _mm512_slli_epi16(_mm512_add_epi16(s.freq, one), 5));
  const __m256i least_of =
      _mm256_min_epu16(_mm512_castsi512_si256(order), _mm512_extracti64x4_epi64(order, 1));
  const __m128i least = _mm_minpos_epu16(
      _mm_min_epu16(_mm256_castsi256_si128(least_of), _mm256_extracti128_si256(least_of, 1)));
  const __mmask32 greatest = __mmask32(1) << (_mm_cvtsi128_si32(least) & (kBuckets - 1));
  s.freq =
      _mm512_mask_add_epi16(s.freq, greatest, s.freq, _mm512_set1_epi16(short(int(kTotal) - sum)));
  return s;
}

}  // namespace

// As make_alias, in closed form. The sweep takes slots from the large ones as smalls need them:
// with sums of what is missing (of small ones) and over (of large ones), up to and with each, a
// small one takes from the first large one up to which as much is over as is missing before it; a
// large one becomes small itself where more is missing than is over up to it, and takes from the
// next.
void make_decoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Decoder* decoder) {
  const __m512i one = _mm512_set1_epi16(1), slots = _mm512_set1_epi16(kBucketSlots);
  const __m512i places =
      _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(kBytes.of)));
  const Symbols symbols = symbols_of(levels, width, escape_level, exponent_bits, places);
  const __m512i freq = symbols.freq;
  const __mmask32 small = _mm512_cmplt_epu16_mask(freq, slots), large = ~small;
  const __m512i lack = _mm512_maskz_sub_epi16(small, slots, freq);
  const __m512i missing = running_sum(lack, places);
  const __m512i missing_before = _mm512_sub_epi16(missing, lack);
  const __m512i over = running_sum(_mm512_maskz_sub_epi16(large, freq, slots), places);
  const __m512i large_over = _mm512_maskz_compress_epi16(large, over);
  __m512i from = _mm512_setzero_si512(), missing_then = from;
  __mmask32 used_up = 0, left = large;
  for (short i = 0; left & (left - 1); ++i, left &= left - 1) {  // the last is never used up
    const __m512i here = _mm512_permutexvar_epi16(_mm512_set1_epi16(i), large_over);
    from = _mm512_mask_add_epi16(from, _mm512_cmpgt_epu16_mask(missing_before, here), from, one);
    const __mmask32 beyond = _mm512_cmpgt_epu16_mask(missing, here);
    const __mmask32 this_one = beyond ? left & -left : 0;
    used_up |= this_one;
    missing_then = _mm512_mask_permutexvar_epi16(
        missing_then, this_one, _mm512_set1_epi16(short(_tzcnt_u32(beyond))), missing);
  }
  from = _mm512_mask_expand_epi16(from, large, _mm512_add_epi16(places, one));
  const __mmask32 divided = small | used_up;
  const __m512i add = _mm512_maskz_sub_epi16(divided, _mm512_permutexvar_epi16(from, large_over),
                                             _mm512_mask_mov_epi16(missing_before, large, over));
  const __m512i other = _mm512_permutexvar_epi16(from, _mm512_maskz_compress_epi16(large, places));
  const __m512i divide =
      _mm512_mask_sub_epi16(freq, large, _mm512_add_epi16(slots, over), missing_then);
  __m512i entry[2];
  for (int h = 0; h < 2; ++h) {
    entry[h] =
        _mm512_or_si512(widened(freq, h), _mm512_slli_epi32(widened(symbols.value, h), kValueAt));
    entry[h] = _mm512_mask_or_epi32(entry[h], __mmask16(symbols.escape >> 16 * h), entry[h],
                                    _mm512_set1_epi32(int(kEscapeBit)));
  }
  for (int h = 0; h < 2; ++h) {
    const auto here = __mmask16(divided >> 16 * h);
    const __m512i second = _mm512_permutex2var_epi32(entry[0], widened(other, h), entry[1]);
    _mm512_store_si512(
        decoder->entry + 16 * h,
        _mm512_maskz_or_epi32(here, entry[h], _mm512_slli_epi32(widened(divide, h), kDivideAt)));
    _mm512_store_si512(
        decoder->entry + kBuckets + 16 * h,
        _mm512_mask_or_epi32(entry[h], here, second, _mm512_slli_epi32(widened(add, h), kAddAt)));
  }
}

}  // namespace avx512

}  // namespace kvzip::channel
