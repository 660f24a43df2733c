// AVX2: tables of 32 bytes are looked up with byte shuffles, for 64 lanes at a time.
#include <immintrin.h>

#include "channel/byte_steps.hpp"
#include "channel/isa_kernels.hpp"

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

// For each set of lanes, of eight, that give off a word: shuffles their words to the end.
struct Gives {
  alignas(16) std::uint8_t shuffle[256][16];
  constexpr Gives() : shuffle() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 7, word = 7; lane >= 0; --lane)
        if (set >> lane & 1) {
          shuffle[set][2 * word] = std::uint8_t(2 * lane);
          shuffle[set][2 * word + 1] = std::uint8_t(2 * lane + 1);
          --word;
        }
  }
};
constexpr Gives kGives;

// 16 bytes in both halves.
inline __m256i twice(const std::uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Indexes from `first` up to 31 more into tables of 32 bytes. A shuffle gives 0 where bit 7 of its
// index is set.
class Index {
 public:
  explicit Index(__m256i i, int first = 0)
      : low_(_mm256_sub_epi8(i, _mm256_set1_epi8(char(first - 0x70)))),
        high_(_mm256_sub_epi8(i, _mm256_set1_epi8(char(first + 16)))) {}

  __m256i operator()(const std::uint8_t* table) const {
    return _mm256_or_si256(_mm256_shuffle_epi8(twice(table), low_),
                           _mm256_shuffle_epi8(twice(table + 16), high_));
  }

 private:
  __m256i low_, high_;
};

// The same of 64 lanes, for tables from 0 on: loaded once for all.
class Indexes {
 public:
  explicit Indexes(const __m256i i[2]) {
    for (int k = 0; k < 2; ++k) {
      low_[k] = _mm256_add_epi8(i[k], _mm256_set1_epi8(0x70));
      high_[k] = _mm256_sub_epi8(i[k], _mm256_set1_epi8(16));
    }
  }

  void find(const std::uint8_t* table, __m256i found[2]) const {
    const __m256i first = twice(table), second = twice(table + 16);
    for (int k = 0; k < 2; ++k)
      found[k] = _mm256_or_si256(_mm256_shuffle_epi8(first, low_[k]),
                                 _mm256_shuffle_epi8(second, high_[k]));
  }

 private:
  __m256i low_[2], high_[2];
};

// Floating point to the nearest, as what is proved below needs it, whatever the program has set.
class ToNearest {
 public:
  ToNearest() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~unsigned(_MM_ROUND_MASK)); }
  ToNearest(const ToNearest&) = delete;
  ~ToNearest() { _mm_setcsr(before_); }

 private:
  unsigned before_;
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

struct Avx2 : ByteSteps<Avx2> {
  using Register = __m256i;

  static __m256i zip_low(__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); }
  static __m256i zip_high(__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); }

  class Lanes : public ByteLanes<Lanes> {
   public:
    using ByteLanes::ByteLanes;

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
            slot[k] =
                _mm256_packus_epi32(_mm256_and_si256(_mm256_load_si256(at + 2 * k), slots),
                                    _mm256_and_si256(_mm256_load_si256(at + 2 * k + 1), slots));
            place[g][k] = _mm256_and_si256(slot[k], places);
          }
          bucket[g] =
              _mm256_packus_epi16(_mm256_srli_epi16(slot[0], 5), _mm256_srli_epi16(slot[1], 5));
        }
        {
          const Indexes of_bucket(bucket);
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
          const Indexes of_symbol(symbol);
          __m256i low[2], high[2], value[2];
          of_symbol.find(d.value, value);
          of_symbol.find(d.freq[0], low);
          of_symbol.find(d.freq[1], high);
#pragma GCC unroll 2
          for (int g = 0; g < 2; ++g) {
            freq[g][0] = _mm256_unpacklo_epi8(low[g], high[g]);
            freq[g][1] = _mm256_unpackhi_epi8(low[g], high[g]);
            found[v + g] =
                std::uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(symbol[g], escape)));
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
              _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
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
  };

  // 32 lanes at a time, as bytes and words where these suffice. Of 16 lanes, those from 4 to 7
  // change places with those from 8 to 11, in the tile, too: packed to words of 16 bits they are in
  // order.
  class EncoderLanes {
   public:
    void load(const std::uint32_t* states) {
      for (int p = 0; p < kLanes; ++p) x_[p] = states[lane_at(p)];
    }
    void store(std::uint32_t* states) const {
      for (int p = 0; p < kLanes; ++p) states[lane_at(p)] = x_[p];
    }

    bool step(const Encoder& e, std::uint32_t base, int value_bits, const std::uint32_t* column,
              int shift, std::size_t lanes, Sink* sink) {
      return lanes == kLanes ? step<false>(e, base, value_bits, column, shift, lanes, sink)
                             : step<true>(e, base, value_bits, column, shift, lanes, sink);
    }

   private:
    static int lane_at(int place) { return (place & ~12) | (place & 4) << 1 | (place & 8) >> 1; }

    // All ones in those of eight lanes, as they lie, that are there.
    static __m256i active(std::size_t first, std::size_t lanes) {
      return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(lanes) - int(first)),
                                _mm256_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11));
    }
    // The low halves of 16 words.
    static __m256i low_halves(const __m256i* pair) {
      const __m256i zero = _mm256_setzero_si256();
      return _mm256_packus_epi32(_mm256_blend_epi16(pair[0], zero, 0xAA),
                                 _mm256_blend_epi16(pair[1], zero, 0xAA));
    }
    // A bit for each byte's lane, lane by lane. Packing has put lane 16 b + 8 a + c into byte
    // 16 a + 8 b + c.
    static std::uint32_t in_order(__m256i bytes) {
      return std::uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
    }

    // What tables of bytes say of 32 values: symbols, with kHeld where there is one.
    static __m256i symbols(const Encoder& e, const __m256i* values, __m256i bases, int value_bits) {
      const int exponent_bits = value_bits - 1;
      const __m256i exponents = _mm256_set1_epi16(short((1 << exponent_bits) - 1));
      const __m128i to_top = _mm_cvtsi32_si128(15 - exponent_bits);
      __m256i exponent[2], sign[2];
      for (int k = 0; k < 2; ++k) {
        const __m256i relative = _mm256_sub_epi16(values[k], bases);
        exponent[k] = _mm256_and_si256(relative, exponents);
        sign[k] = _mm256_sll_epi16(relative, to_top);
      }
      const __m256i at = _mm256_packus_epi16(exponent[0], exponent[1]);
      const __m256i negative = _mm256_packs_epi16(sign[0], sign[1]);
      // As Index, but 0 for indexes above 31, too.
      const __m256i top = _mm256_set1_epi8(0x70);
      const __m256i low = _mm256_adds_epu8(at, top);
      const __m256i high = _mm256_adds_epu8(_mm256_sub_epi8(at, _mm256_set1_epi8(16)), top);
      const auto of = [&](const std::uint8_t* table) {
        return _mm256_or_si256(_mm256_shuffle_epi8(twice(table), low),
                               _mm256_shuffle_epi8(twice(table + 16), high));
      };
      return _mm256_blendv_epi8(of(e.held[0]), of(e.held[1]), negative);
    }
    // The same of shapes that are too wide for these tables.
    static __m256i symbols_of_wide(const Encoder& e, const __m256i* values, __m256i bases,
                                   int value_bits) {
      const __m256i mask = _mm256_set1_epi16(short((1 << value_bits) - 1));
      __m256i symbol[2];
      for (int k = 0; k < 2; ++k) {
        const __m256i relative = _mm256_and_si256(_mm256_sub_epi16(values[k], bases), mask);
        symbol[k] = _mm256_setzero_si256();
        for (int s = 0; s < kBuckets; ++s)
          symbol[k] = _mm256_blendv_epi8(
              symbol[k], _mm256_set1_epi16(short(kHeld | s)),
              _mm256_cmpeq_epi16(relative, _mm256_set1_epi16(short(e.value[s]))));
      }
      return _mm256_packus_epi16(symbol[0], symbol[1]);
    }

    // The slots of places among all ranks.
    static void slots(const Encoder& e, const __m256i* place, __m256i* slot) {
      const __m256i within = _mm256_set1_epi16(31), nibble = _mm256_set1_epi8(15);
      const __m256i fine = _mm256_packus_epi16(_mm256_and_si256(place[0], within),
                                               _mm256_and_si256(place[1], within));
      const Index of_group(
          _mm256_packus_epi16(_mm256_srli_epi16(place[0], 5), _mm256_srli_epi16(place[1], 5)));
      // Bits 3 and 4 choose one of four tables. A blend looks at bit 7.
      const __m256i odd = _mm256_slli_epi16(fine, 4), upper = _mm256_slli_epi16(fine, 3);
      const auto octet = [&](const std::uint8_t (*tables)[kBuckets]) {
        return _mm256_blendv_epi8(_mm256_blendv_epi8(of_group(tables[0]), of_group(tables[1]), odd),
                                  _mm256_blendv_epi8(of_group(tables[2]), of_group(tables[3]), odd),
                                  upper);
      };
      const __m256i up_to = _mm256_set1_epi64x(std::int64_t(0xFF7F3F1F0F070301));
      const __m256i ones = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                            0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
      const __m256i begun =
          _mm256_and_si256(octet(e.octet_begins), _mm256_shuffle_epi8(up_to, fine));
      const __m256i count = _mm256_add_epi8(
          _mm256_shuffle_epi8(ones, _mm256_and_si256(begun, nibble)),
          _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(begun, 4), nibble)));
      const __m256i piece = _mm256_add_epi8(octet(e.octet_before), count);
      // The same with its bits 4 and 5; a shuffle looks at those below, and at bit 7, which is 0.
      const __m256i odd_piece = _mm256_slli_epi16(piece, 3);
      const __m256i upper_piece = _mm256_slli_epi16(piece, 2);
      const auto of_piece = [&](const std::uint8_t* table) {
        const auto part = [&](int k) { return _mm256_shuffle_epi8(twice(table + 16 * k), piece); };
        return _mm256_blendv_epi8(_mm256_blendv_epi8(part(0), part(1), odd_piece),
                                  _mm256_blendv_epi8(part(2), part(3), odd_piece), upper_piece);
      };
      const __m256i low = of_piece(e.shift_bytes[0]), high = of_piece(e.shift_bytes[1]);
      const __m256i all = _mm256_set1_epi16(kTotal - 1);
      slot[0] = _mm256_and_si256(_mm256_add_epi16(place[0], _mm256_unpacklo_epi8(low, high)), all);
      slot[1] = _mm256_and_si256(_mm256_add_epi16(place[1], _mm256_unpackhi_epi8(low, high)), all);
    }

    // In passes over all lanes, each with short chains of instructions and few constants. All go
    // from the last lanes to the first, so that one begins while the one before still runs.
    template <bool limited>
    bool step(const Encoder& e, std::uint32_t base, int value_bits, const std::uint32_t* column,
              int shift, std::size_t lanes, Sink* sink) {
      const std::size_t count = limited ? (lanes + 31) / 32 : kLanes / 32;  // turns of a pass
      __m256i freq[kLanes / 16], start[kLanes / 16];
      if (!look_up<limited>(e, base, value_bits, column, shift, lanes, count, freq, start, sink))
        return false;
      __m256i place[kLanes / 16], less[kLanes / 16];
      // A state that is divided is less than 2^22 times its frequency.
      if (limited || e.above_half)
        divide<limited, true>(lanes, count, freq, start, place, less, sink);
      else divide<limited, false>(lanes, count, freq, start, place, less, sink);
      combine<limited>(e, lanes, count, place, less);
      return true;
    }

    // Frequencies of the lanes' symbols, and where their ranks begin. Escapes are written.
    template <bool limited>
    static bool look_up(const Encoder& e, std::uint32_t base, int value_bits,
                        const std::uint32_t* column, int shift, std::size_t lanes,
                        std::size_t count, __m256i* freq, __m256i* start, Sink* sink) {
      const __m256i keep = _mm256_set1_epi32((1 << value_bits) - 1);
      const __m256i bases = _mm256_set1_epi16(short(base));
      const __m128i right = _mm_cvtsi32_si128(shift);
      for (std::size_t v = count; v-- > 0;) {
        const auto* const in = reinterpret_cast<const __m256i*>(column + 32 * v);
        const auto value_of = [&](int k) {
          return _mm256_and_si256(_mm256_srl_epi32(_mm256_load_si256(in + k), right), keep);
        };
        const __m256i values[2] = {_mm256_packus_epi32(value_of(0), value_of(1)),
                                   _mm256_packus_epi32(value_of(2), value_of(3))};
        __m256i symbol = e.width > kBuckets ? symbols_of_wide(e, values, bases, value_bits)
                                            : symbols(e, values, bases, value_bits);
        if (__builtin_expect(~_mm256_movemask_epi8(symbol), 0)) {
          std::uint32_t left = ~in_order(symbol);
          if (limited && lanes - 32 * v < 32) left &= (1u << (lanes - 32 * v)) - 1;
          if (left) {
            if (e.outside & kNoCell) return false;
            alignas(32) std::uint16_t escapes[32];
            for (int k = 0; k < 2; ++k)
              _mm256_store_si256(reinterpret_cast<__m256i*>(escapes) + k, values[k]);
            for (; left; left &= ~(1u << (31 - __builtin_clz(left))))
              *--sink->escapes = escapes[31 - __builtin_clz(left)];
          }
          // Lanes that are not there have any symbol.
          const auto escape = char(kHeld | (e.outside >> kSymbolAt & (kBuckets - 1)));
          symbol = _mm256_blendv_epi8(_mm256_set1_epi8(escape), symbol, symbol);
        }
        const Index of_symbol(symbol, kHeld);
        const __m256i freq_low = of_symbol(e.freq[0]), freq_high = of_symbol(e.freq[1]);
        const __m256i start_low = of_symbol(e.start[0]), start_high = of_symbol(e.start[1]);
        freq[2 * v] = _mm256_unpacklo_epi8(freq_low, freq_high);
        freq[2 * v + 1] = _mm256_unpackhi_epi8(freq_low, freq_high);
        start[2 * v] = _mm256_unpacklo_epi8(start_low, start_high);
        start[2 * v + 1] = _mm256_unpackhi_epi8(start_low, start_high);
      }
      return true;
    }

    // Words are given off, and states divided by their frequencies. `top_bit`: whether states may
    // have it then.
    //
    // A quotient of floating point, rounded to the nearest whole number, is the right one or one
    // more: a state is below 2^22 times its frequency, so rounding it to 24 bits, in one step or in
    // two, changes the quotient by less than 3/8, and rounding the quotient by 1/8 at most. (For
    // all frequencies and quotients, the least and the greatest state of each, this was tried,
    // too.)
    template <bool limited, bool top_bit>
    void divide(std::size_t lanes, std::size_t count, const __m256i* freq, const __m256i* start,
                __m256i* place, __m256i* less, Sink* sink) {
      const __m256i zero = _mm256_setzero_si256();
      std::uint16_t* words = sink->words;
      for (std::size_t v = 2 * count; v-- > 0;) {
        auto* const at = reinterpret_cast<__m256i*>(x_) + 2 * v;
        const __m256i freqs[2] = {_mm256_unpacklo_epi16(freq[v], zero),
                                  _mm256_unpackhi_epi16(freq[v], zero)};
        __m256i there[2], x[2], left[2], fits[2], q[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          x[k] = _mm256_load_si256(at + k);
          fits[k] = _mm256_cmpgt_epi32(freqs[k], _mm256_srli_epi32(x[k], 22));
          if (limited) {
            there[k] = active(16 * v + 4 * std::size_t(k), lanes);
            fits[k] = _mm256_or_si256(fits[k], _mm256_cmpeq_epi32(there[k], zero));
          }
          left[k] = _mm256_srlv_epi32(x[k], _mm256_andnot_si256(fits[k], _mm256_set1_epi32(16)));
          __m256 number = _mm256_cvtepi32_ps(left[k]);
          if (top_bit)  // it has counted as a sign
            number = _mm256_blendv_ps(number, _mm256_add_ps(number, _mm256_set1_ps(4294967296.0f)),
                                      _mm256_castsi256_ps(left[k]));
          q[k] = _mm256_cvtps_epi32(_mm256_div_ps(number, _mm256_cvtepi32_ps(freqs[k])));
          const __m256i high = _mm256_slli_epi32(q[k], kProbBits);
          _mm256_store_si256(at + k, limited ? _mm256_blendv_epi8(x[k], high, there[k]) : high);
        }
        const __m256i fit = _mm256_packs_epi32(fits[0], fits[1]);
        const __m256i low = low_halves(x);
        const unsigned full = ~unsigned(_mm_movemask_epi8(
            _mm_packs_epi16(_mm256_castsi256_si128(fit), _mm256_extracti128_si256(fit, 1))));
        const auto give = [&](__m128i of, unsigned set) {
          _mm_storeu_si128(
              reinterpret_cast<__m128i*>(words - kSpareWords),
              _mm_shuffle_epi8(
                  of, _mm_load_si128(reinterpret_cast<const __m128i*>(kGives.shuffle[set]))));
          words -= __builtin_popcountll(set);
        };
        give(_mm256_extracti128_si256(low, 1), full >> 8 & 255);
        give(_mm256_castsi256_si128(low), full & 255);
        const __m256i rank =
            _mm256_sub_epi16(low_halves(left), _mm256_mullo_epi16(low_halves(q), freq[v]));
        less[v] = _mm256_srai_epi16(rank, 15);
        place[v] =
            _mm256_add_epi16(start[v], _mm256_min_epu16(rank, _mm256_add_epi16(rank, freq[v])));
      }
      sink->words = words;
    }

    // States from quotients and places.
    template <bool limited>
    void combine(const Encoder& e, std::size_t lanes, std::size_t count, const __m256i* place,
                 const __m256i* less) {
      for (std::size_t v = count; v-- > 0;) {
        __m256i slot[2];
        slots(e, place + 2 * v, slot);
        auto* const at = reinterpret_cast<__m256i*>(x_ + 32 * v);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const __m256i one_less = less[2 * v + std::size_t(k) / 2];
          const __m256i lowest = _mm256_or_si256(
              slot[k / 2], _mm256_and_si256(one_less, _mm256_set1_epi16(short(-int(kTotal)))));
          const __m256i x = _mm256_load_si256(at + k);
          const __m256i y = _mm256_add_epi32(x, k % 2 ? _mm256_unpackhi_epi16(lowest, one_less)
                                                      : _mm256_unpacklo_epi16(lowest, one_less));
          const std::size_t first = 32 * v + 16 * (std::size_t(k) / 2) + 4 * (std::size_t(k) % 2);
          _mm256_store_si256(at + k, limited ? _mm256_blendv_epi8(x, y, active(first, lanes)) : y);
        }
      }
    }

    ToNearest rounding_;
    alignas(32) std::uint32_t x_[kLanes] = {};
  };

  // 32 channels of 16 tokens, from `values` on, as rows: row t has channels 0 to 7 and 16 to 23 of
  // token t in its lower half, and 8 to 15 and 24 to 31 in its upper one. Unpacking a row, which
  // takes of each half, gives channels as they follow each other.
  static void turn(const std::uint8_t (*values)[kLanes], std::size_t token, __m256i rows[16]) {
    const auto of = [&](int c) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(values[c] + token));
    };
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      rows[i] = _mm256_set_m128i(of(i + i / 8 * 8 + 8), of(i + i / 8 * 8));
    transpose_bytes(rows);
  }

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
      const __m256i numbers =
          _mm256_or_si256(_mm256_or_si256(_mm256_andnot_si256(mask, value),
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

  template <typename T>
  static void columns(const T (*rows)[kStrip], std::size_t token, Tile<T>& tile) {
    for (int part = 0; part < int(2 * sizeof(T)); ++part)
      for (int half = 0; half < 2; ++half) {
        // Four rows and the four that are eight further, as EncoderLanes has them.
        __m256i r[8];
        for (int i = 0; i < 8; ++i)
          r[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows[4 * half + i + (i & 4)]) +
                                   part);
        transpose(r);
        for (int i = 0; i < 8; ++i)
          _mm256_store_si256(reinterpret_cast<__m256i*>(tile.word[8 * part + i] + token) + half,
                             r[i]);
      }
  }
};

}  // namespace

KVZIP_KERNELS(avx2, Avx2)

}  // namespace kvzip::channel
