// Static rANS over sign and exponent with a table per channel; mantissas apart. The format is
// spec.md; names here follow it. Kernels allocate nothing and trust nothing they decode.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip::channel {

constexpr int kLanes = 128;        // rANS states of a block, one token each
constexpr int kStrip = 64;         // channels that are decoded into one tile
constexpr int kBuckets = 32;       // of an alias table
constexpr int kBucketSlots = 32;
constexpr int kProbBits = 10;      // probabilities are multiples of 1/1024
constexpr std::uint32_t kTotal = 1u << kProbBits;
constexpr std::uint32_t kLow = 1u << 16;  // states stay in [2^16, 2^32)
constexpr int kMaxSymbols = 512;   // values of sign and exponent

// One probability table as an alias table. A slot of 0..1023 lies in bucket slot/32 at place
// slot%32; below `divide[bucket]` the entry is own[bucket], else other[bucket].
// Entry: frequency (11 bits), what to add to the place to get the rank (11), value (9), escape (1).
struct alignas(64) Decoder {
  std::uint32_t divide[kBuckets];
  std::uint32_t own[kBuckets];
  std::uint32_t other[kBuckets];
};

constexpr std::uint32_t entry(std::uint32_t freq, std::uint32_t add, std::uint32_t value,
                              std::uint32_t escape) {
  return freq | (add & 0x7FF) << 11 | value << 22 | escape << 31;
}

// The same table from the other side: a symbol and a rank give the slot.
struct Encoder {
  std::uint8_t symbol[kMaxSymbols];  // of a value relative to the channel's base; kEscape: none
  std::uint16_t start[kBuckets];     // of a symbol's ranks in `slot`
  std::uint16_t freq[kBuckets];
  std::uint16_t slot[kTotal];
  std::uint8_t escape;               // symbol that stands for all other values, or kNone
};
constexpr std::uint8_t kNone = 255;

// How a channel uses a shape: value = (shape's value + base) mod 2^bits.
struct Channel {
  std::uint16_t shape;
  std::uint16_t base;
  bool constant;              // every number of the channel is `number`
  std::uint32_t number;
};

// A whole part's tables. `value_bits`: of sign and exponent; `mantissa_bits`: of the rest.
struct Tables {
  const Decoder* decoders;
  const Encoder* encoders;
  const Channel* channels;  // [heads][dim]
  std::size_t heads, dim;
  int value_bits, mantissa_bits;
};

// A block in memory: [batch, heads, tokens, dim], dim contiguous; strides in numbers.
template <typename T>
struct Block {
  T* data;
  std::size_t batch, tokens;
  std::ptrdiff_t batch_stride, head_stride, token_stride;
};

// Turns levels into a table. `levels`: 2*width of them, value (sign, exponent) at 2*exponent+sign,
// then the escape's. Returns false when they are no table: no symbol, or more than 32.
bool make_shape(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                int exponent_bits, Decoder* decoder, Encoder* encoder);

// Adds the block's values to counts[heads*dim][1 << value_bits] and compares each number with the
// first of its channel: `same` stays true where all are equal to first[channel].
template <typename T>
void count(const Block<const T>& block, std::size_t heads, std::size_t dim, int mantissa_bits,
           int value_bits, std::uint32_t* counts, const T* first, std::uint8_t* same);

// Chooses the levels of a table from counts of `2*exponents` values, those of the positive first,
// and of numbers that are `outside` of them all.
// `levels` has room for 2*exponents. Sets the lowest exponent it holds, how many, and the escape's
// level; returns false when nothing was counted.
bool choose_levels(const std::uint32_t* counts, std::uint32_t exponents, std::uint64_t outside,
                   std::uint8_t* levels, std::uint32_t* low, std::size_t* width,
                   std::uint8_t* escape_level);

// Bytes of the mantissa section; the same for every block of these tables and tokens.
std::size_t mantissa_bytes(const Tables& tables, std::size_t batch, std::size_t tokens);

struct Streams {
  std::uint32_t states[kLanes];
  std::size_t words, escapes;
};

// Encodes sign and exponent, last symbol first. `words` and `escapes` are filled from their ends
// (`words_end`, `escapes_end`) downwards; there must be room for one of each for every number.
// Returns false when a number has no symbol in its channel's table, which has no escape.
template <typename T>
bool encode_values(const Tables& tables, const Block<const T>& block, std::uint16_t* words_end,
                   std::uint16_t* escapes_end, Streams* streams);

template <typename T>
void encode_mantissas(const Tables& tables, const Block<const T>& block, std::uint8_t* out);

// Decodes a block into place. Returns false when the streams do not fit each other.
template <typename T>
bool decode(const Tables& tables, const Block<T>& block, const std::uint8_t* states,
            const std::uint8_t* escapes, std::size_t escape_count, const std::uint8_t* mantissas,
            const std::uint8_t* words, std::size_t word_count);

}  // namespace kvzip::channel
