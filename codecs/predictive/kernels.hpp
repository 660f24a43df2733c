// Predicts each layer's keys and values from the layers before and from the channels before, in
// integers, and turns every number into an interval for rANS. spec.md has the arithmetic. Kernels
// allocate nothing; everything here gives the same answer on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip::predictive {

constexpr int kCdfBits = 24;
constexpr std::uint32_t kCdf = 1u << kCdfBits;
constexpr int kCells = 208;      // of a density's table
constexpr int kAngles = 32;      // of a pair's table of residual covariances
constexpr int kTile = 64;        // tokens that are predicted side by side
constexpr int kLanes = 16;       // rANS states; token t of a block uses state t mod 16
constexpr int kGroup = 16;       // channels between two updates of a token's energy
constexpr int kResidualShift = 10;
constexpr int kTableShift = 3;     // of a token table's entries
constexpr int kInputShift = 28;
constexpr int kZBits = 14;         // 2^14 is a z of 1
constexpr int kClampBits = 28;     // fixed-point values end there
constexpr std::int32_t kClamp = 1 << kClampBits;
constexpr std::int32_t kOne = 1 << 12;  // an energy of 1
constexpr std::uint64_t kLow = 1ull << 31;

// Bits of a number format; numbers are counted in their own order from 0 to `count`-1.
struct Form {
  int exponent_bits, mantissa_bits;
  int bits() const { return 1 + exponent_bits + mantissa_bits; }
};

// How one part's channels are predicted and coded. Arrays are in coding order: for keys, the two
// channels that RoPE turns together stand side by side, those of a head together.
struct Part {
  std::size_t heads, dim;
  std::size_t pairs;                 // per head; 0 for values
  std::size_t first;                 // place of the part's first channel within the layer
  const std::int32_t* order;         // [heads*dim] channel h*dim+d that stands at this place
  // What follows comes twice: for tokens that the layer's table does not know, and for those it does.
  const std::int32_t* scale;         // [2][heads*dim] mean deviation, 2^-4 units
  const std::int32_t* pair_scale;    // [2][heads*pairs][kAngles][2] of the turned pair
  const std::int32_t* pair_slope;    // [2][heads*pairs][kAngles] of the second on the first, 2^-12
  const std::uint64_t* step;         // [pairs] phase of one position, a turn is 2^64
};

struct Layer {
  Part part[2];
  std::size_t width;             // channels of both parts
  std::size_t inputs;            // bytes of an input row, a multiple of 64
  std::size_t row;               // bytes of a row of `within`, a multiple of 64
  const std::int8_t* unit;       // [width] a number is its fixed-point value times 2^unit
  const std::int32_t* bias;      // [width]
  const std::int8_t* weight;     // [width][inputs]
  const std::int32_t* weight_sum;      // [width] 128 times the sum of a row
  const std::int32_t* weight_scale;    // [width], 2^-20
  const std::int8_t* within;     // [width][row] from residuals of channels before
  const std::int32_t* within_sum;      // [width] 128 times the sum of a row
  const std::int32_t* within_scale;    // [width], 2^-20
  const std::int32_t* mean;      // [width] for the next layers' inputs
  const std::int32_t* input_scale;     // [width], 2^-28
  const std::uint8_t* density;   // [width] which table
};

struct Model {
  const std::uint32_t* densities;  // [n][kCells + 1] of 2^24/2 at the end
  const std::int16_t* sine;        // [4096] of a full turn, 2^14 is 1
};

// Numbers of a block in memory: [rows][heads][tokens][dim], with strides in numbers.
template <typename T>
struct Block {
  T* data;
  std::ptrdiff_t row_stride, head_stride, token_stride, dim_stride;
};

// What is kept of a token range while its layers are coded one after the other.
struct Tokens {
  std::size_t rows, count;       // batch rows, tokens in each
  std::uint64_t position;        // of the first token
  std::uint8_t* residual;        // [rows*count][row] residuals + 128
  std::int32_t* base;            // [rows*count][width] the cross-layer prediction
  std::int32_t* value;           // [rows*count][width] fixed-point values, as they become known
  std::int32_t* energy;          // [rows*count], 2^12 is 1
  const std::uint8_t* known;     // [rows*count] whether the layer's token table knows the token
};

// base = bias + weight * input for all tokens; input: [tokens][layer.inputs], 128 added.
void predict(const Layer& layer, const std::uint8_t* input, std::size_t tokens, std::int32_t* base);

// A number's share of [0, 2^24), and the rANS state that codes it.
struct Interval {
  std::uint32_t start, size, lane;
};

// Values and their intervals when the numbers are known: one for each of the part's numbers, in
// the order in which they are coded. `counts`, unless null: [2][channels][kCells] to count cells of
// |z| in, by whether the token is known.
template <typename T>
void model(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
           const Block<const T>& block, Interval* intervals, std::uint32_t* counts);

// The same when they are to be found: numbers are decoded into `block`. Returns false when the
// words do not fit.
template <typename T>
bool decode(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
            const Block<T>& block, const std::uint8_t* states, const std::uint8_t* words,
            std::size_t word_count);

// rANS over n intervals, last first. Words are written downwards from `words_end`; returns how
// many. states: [kLanes].
std::size_t encode(const Interval* intervals, std::size_t n, std::uint32_t* words_end,
                   std::uint64_t* states);

// A layer's values as an input of the layers after it: [tokens][stride] bytes from `out` on.
void quantise(const Layer& layer, const std::int32_t* value, std::size_t tokens, std::uint8_t* out,
              std::size_t stride);

}  // namespace kvzip::predictive
