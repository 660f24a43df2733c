// AVX2: tables of 32 bytes are looked up with byte shuffles, for 32 lanes at a time.
#include <immintrin.h>

#include "channel/kernels_of.hpp"
#include "channel/scalar.hpp"

namespace kvzip::channel {
namespace {

// For each set of lanes, of eight, that take a word: shuffles the next words to those lanes.
struct Takes {
  alignas(16) std::uint8_t shuffle[256][16];
  constexpr Takes() : shuffle() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, word = 0; lane < 8; ++lane) {
        const bool takes = set >> lane & 1;
        shuffle[set][2 * lane] = std::uint8_t(takes ? 2 * word : 0x80);
        shuffle[set][2 * lane + 1] = std::uint8_t(takes ? 2 * word + 1 : 0x80);
        word += takes;
      }
  }
};
constexpr Takes kTakes;

// Indexes below 32 into tables of 32 bytes. A shuffle gives 0 where bit 7 of its index is set.
class Index {
 public:
  explicit Index(__m256i i)
      : low_(_mm256_add_epi8(i, _mm256_set1_epi8(0x70))),
        high_(_mm256_sub_epi8(i, _mm256_set1_epi8(16))) {}

  __m256i operator()(const std::uint8_t* table) const {
    const auto half = [&](int at) {
      return _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(table + at)));
    };
    return _mm256_or_si256(_mm256_shuffle_epi8(half(0), low_),
                           _mm256_shuffle_epi8(half(16), high_));
  }

 private:
  __m256i low_, high_;
};

// 8 x 8 words of 32 bits, rows to columns.
inline void transpose(__m256i r[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = _mm256_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm256_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm256_permute2x128_si256(r[k], r[4 + k], 0x20);
    t[4 + k] = _mm256_permute2x128_si256(r[k], r[4 + k], 0x31);
  }
  for (int k = 0; k < 8; ++k) r[k] = t[k];
}

struct Avx2 : Scalar {
  class Lanes {
   public:
    explicit Lanes(const std::uint32_t* states) { std::memcpy(x_, states, sizeof x_); }

    void store(std::uint32_t* states) const { std::memcpy(states, x_, sizeof x_); }
    void limit(std::size_t lanes) { lanes_ = lanes; }

    template <typename T, int M>
    bool strip(Steps<T>& steps) {
      return each_channel<T, M>(*this, steps);
    }

    bool step(const Decoder& d, const std::uint8_t** words, std::uint32_t* out, int shift,
              std::uint32_t value_mask, bool first, std::uint64_t* escaped) {
      if (lanes_ == kLanes) return step<false>(d, words, out, shift, value_mask, first, escaped);
      std::uint32_t before[kLanes];
      store(before);
      const bool any = step<true>(d, words, out, shift, value_mask, first, escaped);
      std::memcpy(x_ + lanes_, before + lanes_, 4 * (kLanes - lanes_));
      return any;
    }

   private:
    template <bool limited>
    bool step(const Decoder& d, const std::uint8_t** words, std::uint32_t* out, int shift,
              std::uint32_t value_mask, bool first, std::uint64_t* escaped) {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i slots = _mm256_set1_epi32(int(kTotal - 1));
      const __m256i places = _mm256_set1_epi16(kBucketSlots - 1);
      const __m256i before = _mm256_set1_epi32(first ? 0 : -1);
      const __m256i keep = _mm256_set1_epi32(int(value_mask));
      const __m128i left = _mm_cvtsi32_si128(shift);
      const std::uint8_t* p = *words;
      std::uint32_t found[kLanes / 32], any = 0;
      for (int v = 0; v < kLanes / 32; ++v) {
        auto* const at = reinterpret_cast<__m256i*>(x_ + 32 * v);
        auto* const o = reinterpret_cast<__m256i*>(out + 32 * v);
        // Packing takes halves of 128 bits in turn; unpacking below puts them back.
        __m256i slot[2], place[2];
        for (int k = 0; k < 2; ++k) {
          slot[k] = _mm256_packus_epi32(_mm256_and_si256(_mm256_load_si256(at + 2 * k), slots),
                                        _mm256_and_si256(_mm256_load_si256(at + 2 * k + 1), slots));
          place[k] = _mm256_and_si256(slot[k], places);
        }
        const __m256i bucket =
            _mm256_packus_epi16(_mm256_srli_epi16(slot[0], 5), _mm256_srli_epi16(slot[1], 5));
        const Index of_bucket(bucket);
        const __m256i own =
            _mm256_cmpgt_epi8(of_bucket(d.divide), _mm256_packus_epi16(place[0], place[1]));
        const __m256i symbol = _mm256_blendv_epi8(of_bucket(d.other), bucket, own);
        const __m256i add_low = _mm256_andnot_si256(own, of_bucket(d.add[0]));
        const __m256i add_high = _mm256_andnot_si256(own, of_bucket(d.add[1]));
        const Index of_symbol(symbol);
        const __m256i freq_low = of_symbol(d.freq[0]), freq_high = of_symbol(d.freq[1]);
        const __m256i value_low = of_symbol(d.value[0]), value_high = of_symbol(d.value[1]);
        found[v] = std::uint32_t(_mm256_movemask_epi8(value_high));
        any |= found[v];
        const __m256i freq[2] = {_mm256_unpacklo_epi8(freq_low, freq_high),
                                 _mm256_unpackhi_epi8(freq_low, freq_high)};
        const __m256i value[2] = {_mm256_unpacklo_epi8(value_low, value_high),
                                  _mm256_unpackhi_epi8(value_low, value_high)};
        const __m256i rank[2] = {
            _mm256_add_epi16(place[0], _mm256_unpacklo_epi8(add_low, add_high)),
            _mm256_add_epi16(place[1], _mm256_unpackhi_epi8(add_low, add_high))};
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const auto half = [&](const __m256i* pair) {
            return k % 2 ? _mm256_unpackhi_epi16(pair[k / 2], zero)
                         : _mm256_unpacklo_epi16(pair[k / 2], zero);
          };
          const __m256i x = _mm256_load_si256(at + k);
          const __m256i y = _mm256_add_epi32(
              _mm256_mullo_epi32(half(freq), _mm256_srli_epi32(x, kProbBits)), half(rank));
          __m256i more = _mm256_cmpeq_epi32(_mm256_srli_epi32(y, 16), zero);
          const auto lane = std::size_t(v) * 32 + std::size_t(k) * 8;
          auto set = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(more)));
          // Lanes without a token take no words.
          if (limited && lane + 8 > lanes_) set &= lane < lanes_ ? (1u << (lanes_ - lane)) - 1 : 0;
          const __m128i next = _mm_shuffle_epi8(
              _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
              _mm_load_si128(reinterpret_cast<const __m128i*>(kTakes.shuffle[set])));
          p += 2 * __builtin_popcountll(set);
          more = _mm256_and_si256(more, _mm256_set1_epi32(16));
          _mm256_store_si256(at + k, _mm256_or_si256(_mm256_sllv_epi32(y, more),
                                                     _mm256_cvtepu16_epi32(next)));
          const __m256i there = _mm256_and_si256(_mm256_load_si256(o + k), before);
          _mm256_store_si256(
              o + k, _mm256_or_si256(
                         there, _mm256_sll_epi32(_mm256_and_si256(half(value), keep), left)));
        }
      }
      *words = p;
      if (__builtin_expect(!any, 1)) return false;
      escaped[0] = escaped[1] = 0;
      for (std::size_t j = 0; j < lanes_; ++j) {
        // Where packing has put lane j: byte 16 a + 4 b + c of its 32 is lane 8 b + 4 a + c.
        const std::size_t at = j / 4 % 2 * 16 + j / 8 % 4 * 4 + j % 4;
        escaped[j / 64] |= std::uint64_t(found[j / 32] >> at & 1) << j % 64;
      }
      return true;
    }

    alignas(32) std::uint32_t x_[kLanes];
    std::size_t lanes_ = kLanes;
  };

  // 32 bytes of a row of numbers, from the bytes that belong to them.
  template <typename T>
  static __m256i widen(const std::uint8_t* row, int part) {
    const std::uint8_t* p = row + part * int(32 / sizeof(T));
    if constexpr (sizeof(T) == 1) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    else if constexpr (sizeof(T) == 2)
      return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    else return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename T>
  static __m256i add(__m256i a, __m256i b) {
    if constexpr (sizeof(T) == 1) return _mm256_add_epi8(a, b);
    else if constexpr (sizeof(T) == 2) return _mm256_add_epi16(a, b);
    else return _mm256_add_epi32(a, b);
  }

  template <typename T, int M>
  static void merge(const Tile<T>& tile, std::size_t token, std::size_t count, const T* base,
                    const std::uint8_t* mantissas, T* corner, std::ptrdiff_t stride,
                    std::size_t width) {
    constexpr int R = M % 8, B = M / 8;
    for (std::size_t o = 0; o < count; o += 8, mantissas += rows_of_octet(M) * kStrip) {
      Row packed[R], fields[8];
      for (int j = 0; j < R; ++j) packed[j] = row_at(mantissas + (8 * B + j) * kStrip);
      unpack<R>(packed, fields);
      T rows[8][kStrip];
      const bool whole = width == kStrip && count - o >= 8;
      T* const out = whole ? corner + std::ptrdiff_t(o) * stride : rows[0];
      const std::ptrdiff_t step = (whole ? stride : kStrip) * std::ptrdiff_t(sizeof(T));
      for (int part = 0; part < int(2 * sizeof(T)); ++part) {
        __m256i r[8];
        for (int i = 0; i < 8; ++i)
          r[i] = _mm256_load_si256(
              reinterpret_cast<const __m256i*>(tile.word[8 * part + i] + token + o));
        transpose(r);
        const __m256i bases =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(base) + part);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          __m256i m = widen<T>(reinterpret_cast<const std::uint8_t*>(&fields[i]), part);
          if constexpr (sizeof(T) == 2 && B) m = _mm256_slli_epi16(m, 8);
          if constexpr (sizeof(T) == 4) m = _mm256_slli_epi32(m, 16);
          for (int j = 0; j < B; ++j) {
            const __m256i low = widen<T>(mantissas + (8 * j + i) * kStrip, part);
            m = _mm256_or_si256(m, j ? _mm256_slli_epi32(low, 8) : low);
          }
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(reinterpret_cast<char*>(out) + i * step + 32 * part),
              _mm256_or_si256(add<T>(r[i], bases), m));
        }
      }
      if (!whole)
        for (std::size_t i = 0; i < least(8, count - o); ++i)
          std::memcpy(corner + std::ptrdiff_t(o + i) * stride, rows[i], width * sizeof(T));
    }
  }

  template <typename T>
  static void columns(const T (*rows)[kStrip], std::size_t token, Tile<T>& tile) {
    for (int part = 0; part < int(2 * sizeof(T)); ++part)
      for (int o = 0; o < 16; o += 8) {
        __m256i r[8];
        for (int i = 0; i < 8; ++i)
          r[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows[o + i]) + part);
        transpose(r);
        for (int i = 0; i < 8; ++i)
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(tile.word[8 * part + i] + token + std::size_t(o)), r[i]);
      }
  }
};

}  // namespace

KVZIP_KERNELS(avx2, Avx2)

}  // namespace kvzip::channel
