// AVX2: tables of 32 bytes are looked up with byte shuffles, for 64 lanes at a time.
#include <immintrin.h>

#include "channel/kernels_of.hpp"
#include "channel/scalar.hpp"

namespace kvzip::channel {
namespace {

// For each set of lanes, of eight, that take a word: shuffles the next words to those lanes' low
// halves.
struct Takes {
  alignas(32) std::uint8_t shuffle[256][32];
  constexpr Takes() : shuffle() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, word = 0; lane < 8; ++lane) {
        const bool takes = set >> lane & 1;
        shuffle[set][4 * lane] = std::uint8_t(takes ? 2 * word : 0x80);
        shuffle[set][4 * lane + 1] = std::uint8_t(takes ? 2 * word + 1 : 0x80);
        shuffle[set][4 * lane + 2] = shuffle[set][4 * lane + 3] = 0x80;
        word += takes;
      }
  }
};
constexpr Takes kTakes;

// Indexes below 32 of 64 lanes, into tables of 32 bytes. A shuffle gives 0 where bit 7 of its index
// is set.
class Index {
 public:
  explicit Index(const __m256i i[2]) {
    for (int k = 0; k < 2; ++k) {
      low_[k] = _mm256_add_epi8(i[k], _mm256_set1_epi8(0x70));
      high_[k] = _mm256_sub_epi8(i[k], _mm256_set1_epi8(16));
    }
  }

  void find(const std::uint8_t* table, __m256i found[2]) const {
    const auto half = [&](int at) {
      return _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(table + at)));
    };
    const __m256i first = half(0), second = half(16);
    for (int k = 0; k < 2; ++k)
      found[k] = _mm256_or_si256(_mm256_shuffle_epi8(first, low_[k]),
                                 _mm256_shuffle_epi8(second, high_[k]));
  }

 private:
  __m256i low_[2], high_[2];
};

// Values of a strip: sign and seven bits of exponent, a byte each.
struct ValueBytes {
  alignas(64) std::uint8_t of[kStrip][kLanes];
};

// 32 channels of 16 tokens, from `values` on, as rows: row t has channels 0 to 7 and 16 to 23 of
// token t in its lower half, and 8 to 15 and 24 to 31 in its upper one. Unpacking a row, which
// takes of each half, gives channels as they follow each other.
inline void turn(const std::uint8_t (*values)[kLanes], std::size_t token, __m256i rows[16]) {
  const auto of = [&](int c) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(values[c] + token));
  };
  __m256i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    rows[i] = _mm256_set_m128i(of(i + i / 8 * 8 + 8), of(i + i / 8 * 8));
  // Four perfect shuffles of 16 are a transposition.
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
    const __m256i* const from = stage % 2 ? t : rows;
    __m256i* const to = stage % 2 ? rows : t;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + 8]);
      to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + 8]);
    }
  }
}

// Fields of R bits of 32 channels of eight tokens from R rows (strips.hpp has this for any
// instruction set; compilers make a detour of vectors of 64 bytes).
template <int R>
inline void unpack(const std::uint8_t* rows, __m256i f[8]) {
  const auto row = [&](int j) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + j * kStrip));
  };
  const auto bits = [](__m256i r, int from, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(r, from), _mm256_set1_epi8(char(mask)));
  };
  if constexpr (R == 7) {
    f[7] = _mm256_setzero_si256();
    for (int j = 0; j < 7; ++j) {
      f[j] = bits(row(j), 0, 0x7F);
      f[7] = _mm256_or_si256(f[7], bits(row(j), 7 - j, 1 << j));
    }
  } else if constexpr (R == 3) {
    __m256i rest = _mm256_setzero_si256();
    for (int j = 0; j < 3; ++j) {
      f[2 * j] = bits(row(j), 0, 7);
      f[2 * j + 1] = bits(row(j), 3, 7);
      rest = _mm256_or_si256(rest, _mm256_slli_epi16(bits(row(j), 6, 3), 2 * j));
    }
    f[6] = bits(rest, 0, 7);
    f[7] = bits(rest, 3, 7);
  } else {
    static_assert(R == 2, "a field width of one of the formats");
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) f[4 * j + i] = bits(row(j), 2 * i, 3);
  }
}

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
    bool strip(Steps<T, ValueBytes>& steps) {
      if (lanes_ == kLanes) return strip<T, M, false>(steps);
      std::uint32_t before[kLanes];
      store(before);
      const bool good = strip<T, M, true>(steps);
      std::memcpy(x_ + lanes_, before + lanes_, 4 * (kLanes - lanes_));
      return good;
    }

   private:
    template <typename T, int M, bool limited>
    bool strip(Steps<T, ValueBytes>& steps) {
      const std::uint8_t* at = steps.words->at;
      for (std::size_t c = 0; c < steps.width; ++c) {
        steps.template fetch<M>(c, at);
        if (!(steps.live >> c & 1)) continue;
        at = steps.words->ready(at);
        if (!at) return false;
        std::uint64_t escaped[kLanes / 64];
        if (__builtin_expect(step<limited>(steps.decoders[steps.channels[c].shape], &at,
                                           steps.tile->of[c], escaped), 0))
          steps.escaped[steps.escaped_count++] = {c, {escaped[0], escaped[1]}};
      }
      steps.words->at = at;
      return true;
    }

    // One channel of all lanes. Whether there were escapes, and where.
    template <bool limited>
    __attribute__((always_inline)) bool step(const Decoder& d, const std::uint8_t** words,
                                             std::uint8_t* out, std::uint64_t* escaped) {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i slots = _mm256_set1_epi32(int(kTotal - 1));
      const __m256i places = _mm256_set1_epi16(kBucketSlots - 1);
      const __m256i escape = _mm256_set1_epi8(char(d.escape));
      // Packing takes halves of 128 bits in turn.
      const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const std::uint8_t* p = *words;
      std::uint32_t found[kLanes / 32], any = 0;
      __m256i ranks[kLanes / 32][2], freqs[kLanes / 32][2];
#pragma GCC unroll 2
      for (int v = 0; v < kLanes / 32; v += 2) {
        __m256i place[2][2], bucket[2], own[2], symbol[2];
        auto* const rank = ranks + v;
        auto* const freq = freqs + v;
#pragma GCC unroll 2
        for (int g = 0; g < 2; ++g) {
          const auto* const at = reinterpret_cast<const __m256i*>(x_ + 32 * (v + g));
          __m256i slot[2];
          for (int k = 0; k < 2; ++k) {
            slot[k] = _mm256_packus_epi32(_mm256_and_si256(_mm256_load_si256(at + 2 * k), slots),
                                          _mm256_and_si256(_mm256_load_si256(at + 2 * k + 1), slots));
            place[g][k] = _mm256_and_si256(slot[k], places);
          }
          bucket[g] =
              _mm256_packus_epi16(_mm256_srli_epi16(slot[0], 5), _mm256_srli_epi16(slot[1], 5));
        }
        {
          const Index of_bucket(bucket);
          __m256i divide[2], other[2], add[2][2];
          of_bucket.find(d.divide, divide);
          of_bucket.find(d.other, other);
          of_bucket.find(d.add[0], add[0]);
          of_bucket.find(d.add[1], add[1]);
#pragma GCC unroll 2
          for (int g = 0; g < 2; ++g) {
            own[g] = _mm256_cmpgt_epi8(divide[g], _mm256_packus_epi16(place[g][0], place[g][1]));
            symbol[g] = _mm256_blendv_epi8(other[g], bucket[g], own[g]);
            const __m256i low = _mm256_andnot_si256(own[g], add[0][g]);
            const __m256i high = _mm256_andnot_si256(own[g], add[1][g]);
            rank[g][0] = _mm256_add_epi16(place[g][0], _mm256_unpacklo_epi8(low, high));
            rank[g][1] = _mm256_add_epi16(place[g][1], _mm256_unpackhi_epi8(low, high));
          }
        }
        {
          const Index of_symbol(symbol);
          __m256i low[2], high[2], value[2];
          of_symbol.find(d.value, value);
          of_symbol.find(d.freq[0], low);
          of_symbol.find(d.freq[1], high);
#pragma GCC unroll 2
          for (int g = 0; g < 2; ++g) {
            freq[g][0] = _mm256_unpacklo_epi8(low[g], high[g]);
            freq[g][1] = _mm256_unpackhi_epi8(low[g], high[g]);
            found[v + g] = std::uint32_t(
                _mm256_movemask_epi8(_mm256_cmpeq_epi8(symbol[g], escape)));
            any |= found[v + g];
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + 32 * (v + g)),
                               _mm256_permutevar8x32_epi32(value[g], in_order));
          }
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kLanes / 32; v += 2) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
          const auto half = [&](const __m256i of[][2]) {
            const __m256i words = of[v + k / 4][k / 2 % 2];
            return k % 2 ? _mm256_unpackhi_epi16(words, zero) : _mm256_unpacklo_epi16(words, zero);
          };
          auto* const at = reinterpret_cast<__m256i*>(x_ + 32 * v + 8 * k);
          const __m256i y = _mm256_add_epi32(
              _mm256_mullo_epi32(half(freqs), _mm256_srli_epi32(_mm256_load_si256(at), kProbBits)),
              half(ranks));
          const __m256i more = _mm256_cmpeq_epi32(_mm256_srli_epi32(y, 16), zero);
          const auto lane = std::size_t(32 * v + 8 * k);
          auto set = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(more)));
          // Lanes without a token take no words.
          if (limited && lane + 8 > lanes_) set &= lane < lanes_ ? (1u << (lanes_ - lane)) - 1 : 0;
          const __m256i next = _mm256_shuffle_epi8(
              _mm256_broadcastsi128_si256(
                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
              _mm256_load_si256(reinterpret_cast<const __m256i*>(kTakes.shuffle[set])));
          p += 2 * __builtin_popcountll(set);
          const __m256i by = _mm256_and_si256(more, _mm256_set1_epi32(16));
          _mm256_store_si256(at, _mm256_or_si256(_mm256_sllv_epi32(y, by), next));
        }
      }
      *words = p;
      if (__builtin_expect(!any, 1)) return false;
      for (std::size_t h = 0; h < kLanes / 64; ++h) {
        // Byte 16 a + 4 b + c of a packed vector's 32 is lane 8 b + 4 a + c.
        const auto lanes = [&](std::uint32_t packed) {
          return _pdep_u32(packed, 0x0F0F0F0F) | _pdep_u32(packed >> 16, 0xF0F0F0F0);
        };
        escaped[h] = lanes(found[2 * h]) | std::uint64_t(lanes(found[2 * h + 1])) << 32;
        escaped[h] &= first_ones(lanes_ - least(lanes_, 64 * h));
      }
      return true;
    }

    alignas(32) std::uint32_t x_[kLanes];
    std::size_t lanes_ = kLanes;
  };

  template <typename T>
  using Decoded = ValueBytes;

  // 32 channels of a row: values as `turn` gives them; of the mantissas `fields`, the bits above
  // whole bytes, and these, a row each.
  template <typename T, int M>
  static void put(__m256i value, __m256i fields, const std::uint8_t* low, const T* base, T* out) {
    // From their own order to that of `turn`, and back.
    const auto turned = [](__m256i bytes) { return _mm256_permute4x64_epi64(bytes, 0xD8); };
    const auto bytes = [&](int row) {
      return turned(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(low + std::ptrdiff_t(row) * 8 * kStrip)));
    };
    const auto store = [&](int at, __m256i numbers) {
      const __m256i bases = _mm256_load_si256(reinterpret_cast<const __m256i*>(base) + at);
      if constexpr (sizeof(T) == 1) numbers = _mm256_add_epi8(numbers, bases);
      else if constexpr (sizeof(T) == 2) numbers = _mm256_add_epi16(numbers, bases);
      else numbers = _mm256_add_epi32(numbers, bases);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + at, numbers);
    };
    const __m256i exponents = _mm256_set1_epi16(0x7F00), signs = _mm256_set1_epi16(short(0x8000));
    if constexpr (M < 7) {
      const __m256i mask = _mm256_set1_epi8(0x7F);
      const __m256i numbers = _mm256_or_si256(
          _mm256_or_si256(_mm256_andnot_si256(mask, value),
                          _mm256_slli_epi16(_mm256_and_si256(value, mask), M)),
          turned(fields));
      store(0, turned(numbers));
    } else if constexpr (M == 10) {
      const __m256i lows = bytes(0), tops = turned(fields);
      for (int h = 0; h < 2; ++h) {
        const auto unpack = h ? [](__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); }
                              : [](__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); };
        const __m256i word = unpack(_mm256_setzero_si256(), value);
        const __m256i exponent = _mm256_slli_epi16(_mm256_and_si256(word, exponents), 2);
        store(h, _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(word, signs), exponent),
                                 unpack(lows, tops)));
      }
    } else {
      // Sign, seven bits of exponent, eight of which the mantissa's are the lower seven: the
      // exponent goes down a bit.
      const auto narrow = [&](__m256i word) {
        return _mm256_sub_epi16(word, _mm256_srli_epi16(_mm256_and_si256(word, exponents), 1));
      };
      const __m256i field = turned(fields);
      const __m256i tops[2] = {narrow(_mm256_unpacklo_epi8(field, value)),
                               narrow(_mm256_unpackhi_epi8(field, value))};
      if constexpr (M == 7) {
        store(0, tops[0]);
        store(1, tops[1]);
      } else {
        const __m256i first = bytes(0), second = bytes(1);
        const __m256i lows[2] = {_mm256_unpacklo_epi8(first, second),
                                 _mm256_unpackhi_epi8(first, second)};
        for (int h = 0; h < 2; ++h) {
          const __m256i even = _mm256_unpacklo_epi16(lows[h], tops[h]);
          const __m256i odd = _mm256_unpackhi_epi16(lows[h], tops[h]);
          store(2 * h, _mm256_permute2x128_si256(even, odd, 0x20));
          store(2 * h + 1, _mm256_permute2x128_si256(even, odd, 0x31));
        }
      }
    }
  }

  template <typename T, int M>
  static void merge(const ValueBytes& tile, std::size_t token, std::size_t count, const T* base,
                    const std::uint8_t* mantissas, T* corner, std::ptrdiff_t stride,
                    std::size_t width) {
    constexpr int B = M / 8;
    alignas(32) T rows[16][kStrip];
    const bool whole = width == kStrip && count == 16;
    T* const out = whole ? corner : rows[0];
    const std::ptrdiff_t step = whole ? stride : kStrip;
    for (std::size_t h = 0; h < kStrip; h += 32) {
      __m256i values[16];
      turn(tile.of + h, token, values);
      const std::uint8_t* at = mantissas + h;
      for (std::size_t o = 0; o < count; o += 8, at += rows_of_octet(M) * kStrip) {
        __m256i fields[8];
        unpack<M % 8>(at + 8 * B * kStrip, fields);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i)
          put<T, M>(values[o + i], fields[i], at + i * kStrip, base + h,
                    out + std::ptrdiff_t(o + i) * step + h);
      }
    }
    if (!whole)
      for (std::size_t i = 0; i < count; ++i)
        std::memcpy(corner + std::ptrdiff_t(i) * stride, rows[i], width * sizeof(T));
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
