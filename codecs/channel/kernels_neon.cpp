// NEON, of every 64-bit ARM processor: tables of 32 bytes are looked up by one instruction, for 16
// lanes at a time. Encoding is plain C++.
#include <arm_neon.h>

#include "channel/byte_steps.hpp"
#include "channel/isa_kernels.hpp"

namespace kvzip::channel {
namespace {

// For each set of lanes, of eight, that take a word: looks the next words up for those lanes; and
// how many they are.
struct Takes {
  alignas(16) std::uint8_t at[256][16];
  std::uint8_t count[256];
  constexpr Takes() : at(), count() {
    for (int set = 0; set < 256; ++set) {
      int word = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool takes = set >> lane & 1;
        at[set][2 * lane] = std::uint8_t(takes ? 2 * word : 0xFF);  // outside: 0 is found
        at[set][2 * lane + 1] = std::uint8_t(takes ? 2 * word + 1 : 0xFF);
        word += takes;
      }
      count[set] = std::uint8_t(word);
    }
  }
};
constexpr Takes kTakes;

inline uint8x16x2_t table_of(const std::uint8_t* bytes) {
  return {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
}

// A bit for each of eight lanes whose word is all ones.
inline unsigned bits_of(uint16x8_t lanes) {
  const uint16x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return vaddvq_u16(vandq_u16(lanes, bit));
}

struct Neon : ByteSteps<Neon> {
  using Register = uint8x16_t;

  static uint8x16_t zip_low(uint8x16_t a, uint8x16_t b) { return vzip1q_u8(a, b); }
  static uint8x16_t zip_high(uint8x16_t a, uint8x16_t b) { return vzip2q_u8(a, b); }

  class Lanes : public ByteLanes<Lanes> {
   public:
    using ByteLanes::ByteLanes;

    // One channel of all lanes. Whether there were escapes, and where.
    template <bool limited>
    __attribute__((always_inline)) bool step(const Decoder& d, const std::uint8_t** words,
                                             std::uint8_t* out, std::uint64_t* escaped) {
      const uint8x16x2_t divide = table_of(d.divide), other = table_of(d.other);
      const uint8x16x2_t add[2] = {table_of(d.add[0]), table_of(d.add[1])};
      const uint8x16x2_t freq[2] = {table_of(d.freq[0]), table_of(d.freq[1])};
      const uint8x16x2_t value = table_of(d.value);
      const uint16x8_t places = vdupq_n_u16(kBucketSlots - 1);
      const std::uint8_t* p = *words;
      uint8x16_t found[kLanes / 16], any = vdupq_n_u8(0);
#pragma GCC unroll 2
      for (std::size_t g = 0; g < kLanes / 16; ++g) {
        uint32x4_t x[4];
        for (int k = 0; k < 4; ++k) x[k] = vld1q_u32(x_ + 16 * g + 4 * k);
        uint16x8_t slot[2], place[2];
        for (int h = 0; h < 2; ++h) {
          slot[h] =
              vuzp1q_u16(vreinterpretq_u16_u32(x[2 * h]), vreinterpretq_u16_u32(x[2 * h + 1]));
          place[h] = vandq_u16(slot[h], places);
        }
        const auto low_bytes = [](uint16x8_t a, uint16x8_t b) {
          return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
        };
        const uint8x16_t bucket = vandq_u8(
            low_bytes(vshrq_n_u16(slot[0], 5), vshrq_n_u16(slot[1], 5)), vdupq_n_u8(kBuckets - 1));
        const uint8x16_t own = vcltq_u8(low_bytes(place[0], place[1]), vqtbl2q_u8(divide, bucket));
        const uint8x16_t symbol = vbslq_u8(own, bucket, vqtbl2q_u8(other, bucket));
        const uint8x16_t add_low = vbicq_u8(vqtbl2q_u8(add[0], bucket), own);
        const uint8x16_t add_high = vbicq_u8(vqtbl2q_u8(add[1], bucket), own);
        const uint8x16_t freq_low = vqtbl2q_u8(freq[0], symbol);
        const uint8x16_t freq_high = vqtbl2q_u8(freq[1], symbol);
        vst1q_u8(out + 16 * g, vqtbl2q_u8(value, symbol));
        found[g] = vceqq_u8(symbol, vdupq_n_u8(d.escape));
        any = vorrq_u8(any, found[g]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const auto words_of = [&](uint8x16_t low, uint8x16_t high) {
            return vreinterpretq_u16_u8(h ? vzip2q_u8(low, high) : vzip1q_u8(low, high));
          };
          const uint16x8_t f = words_of(freq_low, freq_high);
          const uint16x8_t rank = vaddq_u16(place[h], words_of(add_low, add_high));
          const uint32x4_t y[2] = {
              vmlaq_u32(vmovl_u16(vget_low_u16(rank)), vmovl_u16(vget_low_u16(f)),
                        vshrq_n_u32(x[2 * h], kProbBits)),
              vmlaq_u32(vmovl_high_u16(rank), vmovl_high_u16(f),
                        vshrq_n_u32(x[2 * h + 1], kProbBits))};
          const uint32x4_t more[2] = {vcltq_u32(y[0], vdupq_n_u32(kLow)),
                                      vcltq_u32(y[1], vdupq_n_u32(kLow))};
          unsigned set =
              bits_of(vuzp1q_u16(vreinterpretq_u16_u32(more[0]), vreinterpretq_u16_u32(more[1])));
          // Lanes without a token take no words.
          const std::size_t lane = 16 * g + 8 * std::size_t(h);
          if (limited && lane + 8 > lanes_) set &= lane < lanes_ ? (1u << (lanes_ - lane)) - 1 : 0;
          const uint16x8_t next =
              vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(p), vld1q_u8(kTakes.at[set])));
          p += 2 * kTakes.count[set];
          const uint32x4_t by = vdupq_n_u32(16);
          const uint32x4_t word[2] = {vmovl_u16(vget_low_u16(next)), vmovl_high_u16(next)};
          for (int k = 0; k < 2; ++k)
            vst1q_u32(
                x_ + lane + 4 * k,
                vorrq_u32(vshlq_u32(y[k], vreinterpretq_s32_u32(vandq_u32(more[k], by))), word[k]));
        }
      }
      *words = p;
      if (__builtin_expect(!vmaxvq_u8(any), 1)) return false;
      for (std::size_t h = 0; h < kLanes / 64; ++h) {
        escaped[h] = 0;
        for (std::size_t g = 0; g < 4; ++g) {
          const uint8x16_t lanes = found[4 * h + g];
          // Bytes of all ones, widened with their sign, are words of all ones.
          const int8x16_t wide = vreinterpretq_s8_u8(lanes);
          const unsigned set = bits_of(vreinterpretq_u16_s16(vmovl_s8(vget_low_s8(wide)))) |
                               bits_of(vreinterpretq_u16_s16(vmovl_high_s8(wide))) << 8;
          escaped[h] |= std::uint64_t(set) << 16 * g;
        }
        escaped[h] &= first_ones(lanes_ - least(lanes_, 64 * h));
      }
      return true;
    }
  };

  // 16 channels of 16 tokens, from `values` on, as rows.
  static void turn(const std::uint8_t (*values)[kLanes], std::size_t token, uint8x16_t rows[16]) {
    for (int i = 0; i < 16; ++i) rows[i] = vld1q_u8(values[i] + token);
    transpose_bytes(rows);
  }

  // 16 channels of a row: their values; of the mantissas `field`, the bits above whole bytes, and
  // these, a row each.
  template <typename T, int M>
  static void put(uint8x16_t value, uint8x16_t field, const std::uint8_t* low, const T* base,
                  T* out) {
    const auto bytes = [&](int row) { return vld1q_u8(low + row * 8 * kStrip); };
    if constexpr (M < 7) {
      const uint8x16_t exponents = vshlq_n_u8(vandq_u8(value, vdupq_n_u8(0x7F)), M);
      const uint8x16_t numbers =
          vorrq_u8(vorrq_u8(vandq_u8(value, vdupq_n_u8(0x80)), exponents), field);
      vst1q_u8(out, vaddq_u8(numbers, vld1q_u8(base)));
    } else {
      const uint16x8_t exponents = vdupq_n_u16(0x7F00);
      for (int h = 0; h < 2; ++h) {
        const auto words_of = [&](uint8x16_t a, uint8x16_t b) {
          return vreinterpretq_u16_u8(h ? vzip2q_u8(a, b) : vzip1q_u8(a, b));
        };
        if constexpr (M == 10) {
          const uint16x8_t word = words_of(vdupq_n_u8(0), value);
          const uint16x8_t numbers = vorrq_u16(vandq_u16(word, vdupq_n_u16(0x8000)),
                                               vshlq_n_u16(vandq_u16(word, exponents), 2));
          vst1q_u16(out + 8 * h, vaddq_u16(vorrq_u16(numbers, words_of(bytes(0), field)),
                                           vld1q_u16(base + 8 * h)));
        } else {
          // Sign, seven bits of exponent, eight of which the mantissa's are the lower seven: the
          // exponent goes down a bit.
          const uint16x8_t word = words_of(field, value);
          const uint16x8_t top = vsubq_u16(word, vshrq_n_u16(vandq_u16(word, exponents), 1));
          if constexpr (M == 7) {
            vst1q_u16(out + 8 * h, vaddq_u16(top, vld1q_u16(base + 8 * h)));
          } else {
            const uint16x8_t rest = words_of(bytes(0), bytes(1));
            const uint16x8_t numbers[2] = {vzip1q_u16(rest, top), vzip2q_u16(rest, top)};
            for (int k = 0; k < 2; ++k)
              vst1q_u32(out + 8 * h + 4 * k, vaddq_u32(vreinterpretq_u32_u16(numbers[k]),
                                                       vld1q_u32(base + 8 * h + 4 * k)));
          }
        }
      }
    }
  }
};

}  // namespace

KVZIP_KERNELS(neon, Neon)

}  // namespace kvzip::channel
