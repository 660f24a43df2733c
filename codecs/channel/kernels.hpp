// Static rANS over sign and exponent with a table per channel; mantissas apart. The format is
// spec.md; names here follow it. Kernels allocate nothing and trust nothing they decode.
#pragma once

#include <cstddef>
#include <cstdint>

#include "native/simd.hpp"

namespace kvzip::channel {

constexpr int kLanes = 128;   // rANS states of a stream, one token each
constexpr int kStrip = 64;    // channels that are decoded into one tile
constexpr int kBuckets = 32;  // of an alias table
constexpr int kBucketSlots = 32;
constexpr int kProbBits = 10;  // probabilities are multiples of 1/1024
constexpr std::uint32_t kTotal = 1u << kProbBits;
constexpr std::uint32_t kLow = 1u << 16;  // states stay in [2^16, 2^32)
constexpr std::uint32_t kTop =
    1u << 24;                     // from here on they are stored in four bytes, else in three
constexpr int kMaxSymbols = 512;  // values of sign and exponent
constexpr std::uint8_t kNone = 255;

// A shape's frequencies and alias table, as spec.md has them.
struct Alias {
  int exponent_bits;
  std::uint32_t symbols;
  std::uint32_t width;           // exponents
  std::uint32_t escape;          // the symbol that stands for all other values, or kNone
  std::uint32_t freq[kBuckets];  // 0 where there is no symbol, as everything below
  std::uint32_t value[kBuckets];
  std::uint32_t divide[kBuckets];
  std::uint32_t other[kBuckets];
  std::uint32_t add[kBuckets];  // rank - place of the other's slots
};

// What a slot says, for decoding. Slot x lies in bucket x/32 at place x%32; entries are
//   entry[bucket]:       divide (5 bits) 0 (6) value (9) escape (1) frequency (11)
//   entry[32 + bucket]:  rank - place (11) value escape frequency
// The first counts where place < divide. A bucket that is all one symbol's has it in the second,
// and divide 0; so five bits are enough, and comparing (place, ones) with the whole entry tells.
struct Decoder {
  alignas(64) std::uint32_t entry[2 * kBuckets];
  // The same in tables of bytes, for byte shuffles: of a bucket, where it divides, whose the rest
  // is, and what that one adds, low and high bytes; of a symbol, its frequency likewise, and its
  // value, the sign in the top bit.
  alignas(64) std::uint8_t divide[kBuckets], other[kBuckets], add[2][kBuckets];
  std::uint8_t freq[2][kBuckets], value[kBuckets];
  std::uint8_t escape;  // the symbol, or kNone
};
constexpr int kValueAt = 12, kAddAt = 21, kDivideAt = 27;
constexpr std::uint32_t kEscapeBit = 1u << (kValueAt - 1);
constexpr std::uint32_t kFreqMask = kEscapeBit - 1;

// The same table from the other side: what each instruction set's kernels look up, and only theirs
// is set. `outside`: the cell of what the shape does not hold; a cell is frequency (11), where its
// ranks begin among all (10), symbol (5), and what is special about it.
struct Encoder {
  std::uint32_t outside;
  std::uint32_t width;  // exponents that it holds
  // Plain C++ and AVX-512. Of a value relative to the channel's base: its cell.
  std::uint32_t cell[kMaxSymbols];
  // Plain C++.
  std::uint64_t reciprocal[kBuckets];  // of a symbol: ceil(2^42 / frequency)
  std::uint16_t slot[kTotal];          // of each rank, symbol after symbol
  // AVX-512. The same in pieces of slots that follow each other, at most two a bucket, which fit in
  // six registers: where they begin, a bit for each rank; how many begin before each 32 of these,
  // less 1; and slot - rank, mod 2^16, of each piece.
  std::uint32_t begins[kBuckets], before[kBuckets];
  std::uint16_t shift[2 * kBuckets];
  // AVX2. All of it in tables of bytes, for byte shuffles. Of values of the first 32 exponents, of
  // either sign: kHeld and their symbol, or 0. Of a symbol: frequency, and where its ranks begin.
  // Of eight ranks, the n-th of 32 in table n: where pieces begin, and how many do before, less 1.
  // Of a piece: its shift. Low bytes, then high bytes. And of a symbol its value, or kNoValue.
  alignas(64) std::uint8_t held[2][kBuckets], freq[2][kBuckets], start[2][kBuckets];
  std::uint8_t octet_begins[4][kBuckets], octet_before[4][kBuckets];
  std::uint8_t shift_bytes[2][2 * kBuckets];
  std::uint16_t value[kBuckets];
  bool above_half;  // whether a frequency is
};
constexpr std::uint16_t kNoValue = 0xFFFF;
constexpr std::uint8_t kHeld = 128;
constexpr int kStartAt = 11, kSymbolAt = 21;
constexpr std::uint32_t kNoCell = 1u << 30;      // cannot be coded
constexpr std::uint32_t kEscapeCell = 1u << 31;  // coded as the escape

// How a channel uses a shape: value = (shape's value + base) mod 2^bits.
struct Channel {
  std::uint16_t shape;
  std::uint16_t base;
  bool constant;  // every number of the channel is `number`
  std::uint32_t number;
};

// A strip of a head's channels: a bit for each that is not constant, and how many there are in the
// strips before it, of this head and of those before.
struct Live {
  std::uint64_t channels;
  std::size_t before;
};

// A whole part's tables. `value_bits`: of sign and exponent; `mantissa_bits`: of the rest.
struct Tables {
  const Decoder* decoders;
  const Encoder* encoders;
  const Channel* channels;  // [heads][dim]
  const Live* live;         // [heads][strips of a head], and one more: before it are all
  std::size_t heads, dim;
  int value_bits, mantissa_bits;
  bool wide;  // whether a value's exponent may take more than seven bits
};

// A block in memory: [batch, heads, tokens, dim], dim contiguous; strides in numbers.
template <typename T>
struct Block {
  T* data;
  std::size_t batch, tokens;
  std::ptrdiff_t batch_stride, head_stride, token_stride;
};

// --- tables ----------------------------------------------------------------------------------

// Whether levels are a table: 1 to 32 symbols. `levels`: 2*width of them, value (sign, exponent) at
// 2*exponent+sign; the escape's apart.
bool are_levels(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level);

// From levels that are a table to symbols, frequencies and buckets; from these to what kernels look
// up.
Alias make_alias(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                 int exponent_bits);
void make_decoder(const Alias& alias, Decoder* decoder);
void make_encoder(const Alias& alias, int exponent_bits, simd::Level level, Encoder* encoder);

// From levels to what the kernels that run here look up.
void make_decoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Decoder* decoder);
void make_encoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Encoder* encoder);

// How far apart the counts of channels lie: those of neighbours must not fall on the same lines of
// a cache.
constexpr std::size_t count_stride(int value_bits) { return (std::size_t(1) << value_bits) + 16; }

// Adds the block's values to the counts of [heads*dim] channels, which are of 8 or 32 bits.
template <typename T, typename C>
void count(const Block<const T>& block, std::size_t heads, std::size_t dim, int mantissa_bits,
           C* counts);

// Whether all numbers of a channel are the same one. There is at least one.
template <typename T>
bool constant(const Block<const T>& block, std::size_t head, std::size_t channel);

// Chooses the levels of a table from counts of `2*exponents` values, those of the positive first,
// and of numbers that are `outside` of them all. The table holds at most `most` exponents.
// `levels` has room for 2*exponents. Sets the lowest exponent it holds, how many, and the escape's
// level; returns false when nothing was counted.
bool choose_levels(const std::uint32_t* counts, std::uint32_t exponents, std::uint32_t most,
                   std::uint64_t outside, std::uint8_t* levels, std::uint32_t* low,
                   std::size_t* width, std::uint8_t* escape_level);

// --- blocks: each function has one result, whatever instructions it uses ------------------------

// A run of a block's strips that is coded by itself, with states, words and escapes of its own.
struct Stream {
  std::size_t first_strip, strips;
  std::size_t lanes;      // states: as many as the first strip has tokens
  std::size_t mantissas;  // bytes of them, all
  std::size_t carried;    // words of 16 bits at their end that the first states carry
  std::size_t stored_mantissas() const { return mantissas - 2 * carried; }
  // The three lower bytes of each state, and a bit for each that has a fourth.
  std::size_t stored_states() const { return 3 * lanes + (lanes + 7) / 8; }
};

// How a block is cut into streams; the same for every block of these tables and tokens.
class Streams {
 public:
  Streams(const Tables& tables, std::size_t batch, std::size_t tokens);
  std::size_t count() const { return count_; }
  std::size_t mantissas() const { return mantissas_before(strips_); }
  Stream operator[](std::size_t i) const;

 private:
  std::size_t lanes_at(std::size_t strip) const;
  std::size_t mantissas_before(std::size_t strip) const;

  const Tables& tables_;
  std::size_t tokens_, in_head_, in_row_, in_group_, strips_, count_;
};

// Where the parts of a coded stream are, and how long those of no fixed length are.
struct Coded {
  Stream stream;
  // `tops`: the highest bytes of those states that have one.
  const std::uint8_t *states, *mantissas, *words, *escapes, *tops;
  std::size_t word_count, escape_count, top_count;
};

// Decodes a block's streams into place. Returns false when one's parts do not fit each other.
template <typename T>
bool decode(const Tables& tables, const Block<T>& block, const Coded* streams, std::size_t count);

// What a stream is encoded to: states, as many as there are lanes at most, and for all else the
// ends of where it goes, then the beginnings of what was written. There must be room for all
// mantissas, and for one word and one escape for every number; kSpareWords below the words may be
// written over.
constexpr int kSpareWords = 8;
struct Sink {
  std::uint32_t states[kLanes];
  std::uint8_t* mantissas;
  std::uint16_t *words, *escapes;
};

// Encodes one stream of a block. Returns false when a number has no symbol in its channel's table,
// which has no escape.
template <typename T>
bool encode(const Tables& tables, const Block<const T>& block, const Stream& stream, Sink* sink);

}  // namespace kvzip::channel
