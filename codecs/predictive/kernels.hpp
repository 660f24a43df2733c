// Predicts each layer's keys and values from the layers before and from the channels before, in
// integers, and turns every number into an interval for rANS. spec.md has the arithmetic. Kernels
// allocate nothing; everything here gives the same answer on every machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "native/number_format.hpp"

namespace kvzip::predictive {

constexpr int kCdfBits = 24;
constexpr std::uint32_t kCdf = 1u << kCdfBits;
// The top of all shares says that a number follows as it is; the others lie about the middle of the
// rest.
constexpr std::uint32_t kEscape = 1u << 10;
constexpr std::int32_t kHalf = (kCdf - kEscape) / 2;
constexpr int kCells = 64;  // of a density's table
// The exponent and the three bits below it of a float32 that holds the lower edge of cell 0, 2^15.
constexpr int kFirstCell = (127 + 15) << 3;
constexpr int kSteps = 32;   // of a search's table
constexpr int kAngles = 32;  // of a pair's tables
constexpr int kTile = 64;    // tokens that are predicted side by side
constexpr int kStream = 32;  // tokens whose words come from one stream, a part of a tile
constexpr int kStreams = kTile / kStream;
constexpr std::size_t kMostTokens = std::size_t(1) << 30;  // of a chain
constexpr int kMostGroup = 64;                             // channels of a group
constexpr int kMostLanes = kMostGroup / 2;
constexpr int kResidualShift = 12;
constexpr int kZBits = 16;                // 2^16 is a z of 1
constexpr std::int32_t kClamp = 1 << 28;  // fixed-point values end there
constexpr std::int32_t kOne = 1 << 12;    // an energy of 1
constexpr std::uint64_t kLow = 1ull << 31;

inline std::size_t up4(std::size_t n) { return (n + 3) / 4 * 4; }

// Densities: of each, cells in units of 2^-24, those of one side.
struct Densities {
  const std::int32_t* from;  // [shapes][kCells] share below a cell
  const std::int32_t* rise;  // [shapes][kCells] share of a cell
  // Both with the two of a cell side by side, for who fetches them one after the other.
  const std::int32_t* from_rise;  // [shapes][kCells][2]
  // Where to begin a search: about which cell, and how far in, has a given share above it. The
  // share as a float32 of at least 2^7 is in one of kSteps steps, two an octave; its exponent and
  // the bit below say in which, modulo kSteps. There kFirstCell + cell is a polynomial, lowest
  // power first, of the bits below these, counted from 1 to 1.5. Not part of the format.
  const float* search;       // [shapes][4][kSteps]
  const float* search_four;  // [shapes][kSteps][4]
};

// How one part's channels are coded. Arrays are in coding order: for keys, first the pairs of
// channels that RoPE turns together, the two side by side.
struct Part {
  std::size_t heads, dim;
  std::size_t pairs;          // per head; 0 for values
  std::size_t first;          // place of the part's first channel within the layer
  const std::int32_t* order;  // [heads*dim] channel h*dim+d that stands at this place
  const std::uint64_t* step;  // [pairs] phase of one position, a turn is 2^64
  bool side_by_side =
      false;  // whether the pairs of a head are 2 i and 2 i + 1, not i and i + pairs
  std::size_t channels() const { return heads * dim; }
  // Of four channels of the layer, those that hold channels of the part.
  std::size_t first_block() const { return first / 4; }
  std::size_t blocks() const { return (first + channels() + 3) / 4 - first_block(); }
  std::size_t turned() const { return 2 * heads * pairs; }  // channels of pairs
  // Where in its head a pair's first channel is, how far behind it the second, and back.
  std::size_t first_of(std::size_t pair) const { return pair << side_by_side; }
  std::size_t apart() const { return side_by_side ? 1 : pairs; }
  std::size_t pair_of(std::size_t channel) const { return channel % dim >> side_by_side; }
};

// In which order to take the groups of inputs of one block of outputs. Instruction sets without a
// product of four bytes with 32 bits of room begin with pairs: 255 times the weights of one sign
// that come together in them fits 16 bits.
struct Order {
  const std::uint16_t* group;
  std::uint32_t pairs;
};

// What a region has of its own: the predictors. Matrices are in blocks of 4 outputs and 4 inputs.
struct Region {
  const std::int32_t* bias;          // [width]
  const std::int8_t* weight;         // [blocks][inputs/4][4][4]
  const std::int32_t* weight_scale;  // [width], 2^-20
  const std::int8_t* within;         // [blocks][blocks][4][4] from residuals of channels before
  const std::int32_t* within_scale;  // [width], 2^-20
  // [4*blocks] -128 times the sum of what each output reads: what the 128 added to bytes comes to.
  const std::int32_t *weight_start, *within_start;
  // [blocks] Where kernels ask for it (`Products::in_order`).
  const Order *weight_order = nullptr, *within_order = nullptr;
};

struct Layer {
  Part part[2];
  // Channels that are predicted from those before all of them; a part's last group may be smaller.
  std::size_t group;
  std::size_t lanes;   // rANS states of a token; pair i of a group uses state i mod lanes
  std::size_t width;   // channels of both parts
  std::size_t blocks;  // of 4 channels
  std::size_t inputs;  // a multiple of 4
  std::size_t regions;
  const Region* region;        // [regions]
  const std::uint16_t* reads;  // [blocks] how many blocks of residuals a block of `within` reads
  const std::int8_t* centre;   // [blocks of 4 regions][inputs/4][4][4], null for one region
  const std::int32_t* centre_bias;
  const Order* centre_order;        // [blocks of 4 regions] as a region's
  const std::int8_t* unit;          // [width] a number is its fixed-point value times 2^unit
  const std::int32_t* mean;         // [width] for the next layers' inputs
  const std::int32_t* input_scale;  // [width], 2^-28
  const std::uint8_t* density;      // [width] which table
  // [classes][...], a class being a region, plus the number of regions where the table knows the
  // token.
  const std::int32_t* inverse;       // [width] 2^28 / mean deviation
  const std::int32_t* pair_inverse;  // [heads*pairs][2][kAngles]
  const std::int32_t* pair_slope;    // [heads*pairs][kAngles] of the second on the first, 2^-12
  const std::int16_t* table16;       // [tokens][width] of 2^5 units, or
  const std::int8_t* table8;         // of 2^12 units, or both null
};

// Numbers of a block in memory: [rows][heads][tokens][dim], with strides in numbers.
template <typename T>
struct Block {
  T* data;
  std::ptrdiff_t row_stride, head_stride, token_stride, dim_stride;
};

// Tokens of one region.
struct Tile {
  std::uint32_t start, count;  // places in `Tokens::at`
  std::uint32_t region;
  std::uint32_t stream;  // of its first kStream tokens; of the others those that follow
  std::size_t streams() const { return (count + kStream - 1) / kStream; }
};

// A processor's unit for products of matrices of bytes (AMX). It takes `kUnitOutputs` outputs, and
// `kUnitGroups` groups of four inputs, at a time; what is asked for is rounded up to that.
constexpr std::size_t kUnitOutputs = 32, kUnitGroups = 16;
constexpr std::size_t kUnitTiles = 4;  // at most, in one go
struct MatrixUnit {
  // Before a thread uses it, and after.
  void (*begin)();
  void (*end)();
  // Blocks of four outputs, [blocks][groups][4][4], as the unit takes them: of each of its steps
  // and each output the inputs one after the other, [steps][rows][kUnitGroups][4]. reads, unless
  // null: of how many groups each block's weights are to be taken, as if the others were 0.
  void (*arrange)(const std::int8_t* w, std::size_t blocks, std::size_t groups,
                  const std::uint16_t* reads, std::size_t steps, std::size_t rows, std::int8_t* to);
  // sums[o][t] = w[o] . x[t] of a tile; x: [groups][kTile] of 4 bytes, w: as arranged, from the
  // first of these outputs on.
  void (*products)(const std::uint32_t* x, const std::int8_t* w, std::size_t steps,
                   std::size_t rows, std::size_t outputs, std::size_t tokens,
                   std::int32_t (*sums)[kTile]);
  // The same of several tiles, x: [tiles][groups][kTile], sums: [tiles][rows][kTile].
  void (*products_of_tiles)(const std::uint32_t* x, std::size_t groups, const std::int8_t* w,
                            std::size_t rows, std::size_t outputs, const Tile* tile,
                            std::size_t tiles, std::int32_t (*sums)[kTile]);
};
inline std::size_t unit_steps(std::size_t groups) {
  return (groups + kUnitGroups - 1) / kUnitGroups;
}
// Rows for `blocks` blocks of outputs, so that a step can begin with each.
inline std::size_t unit_rows(std::size_t blocks) { return 4 * blocks + kUnitOutputs - 4; }

// Products of bytes by one instruction set.
struct Products {
  bool in_order;  // whether `of_four` needs an order
  // sums[o][t] = w[o] . (x[t] - 128); x: [groups][kTile] of 4 bytes, w: [groups][4][4], start[o]:
  // -128 times the sum of w[o]. `tokens` of kTile are of interest. What is `ahead` bytes behind w
  // is for the next call.
  void (*of_four)(const std::uint32_t* x, const std::int8_t* w, std::size_t groups,
                  std::size_t ahead, const Order* order, const std::int32_t* start,
                  std::size_t tokens, std::int32_t sums[4][kTile]);
  const MatrixUnit* unit = nullptr;  // where there is one
};

// What is kept of a token range while its layers are coded one after the other. Bytes of tiles lie
// as [tile][channels/4][kTile][4], 128 added to each.
struct Tokens {
  std::size_t rows, count;    // batch rows, tokens in each
  std::uint64_t position;     // of the first token
  std::int32_t* energy;       // [rows*count], 2^12 is 1
  const std::int32_t* entry;  // [rows*count] in the layer's table, -1: not there
  std::size_t tiles;
  const Tile* tile;
  const std::uint32_t* at;     // [rows*count] tokens in their coding order
  const std::uint32_t* input;  // [tiles][inputs/4][kTile]
  std::uint32_t* residual;     // [tiles][blocks][kTile]
  std::uint32_t* output;       // [tiles][blocks][kTile] what later layers see
  // Of RoPE at each position: sines, cosines and angles, [count][3][pairs of a head].
  const std::int16_t* turns;
  std::int16_t* turn;  // [3][pairs][kTile] scratch, of them
  // Cosines and sines of RoPE as the model turns keys of bf16, [count][2][pairs of a head]; null:
  // pairs are coded as they are after it. And whether it rounds products, not sums alone.
  const float* rotation;
  bool rounds_products;
  float* own_turn;  // [2][pairs][kTile] scratch, of these cosines and sines
  void* numbers;    // [channels][kTile] scratch, of a part's numbers
  Products products;
  // Scratch for its unit: a part's weights, of the region at hand, and what those for inputs make
  // of kUnitTiles tiles.
  std::int8_t *unit_weight, *unit_within;
  std::int32_t (*unit_sums)[kTile];
};

struct Model {
  Densities densities;
  const std::int16_t* sine;  // [4096] of a full turn, 2^14 is 1
};

// Shares of [0, 2^24), by tile, then channel in coding order, then token; room for kTile more than
// there are numbers. A number that has no share, and follows an escape, has a size of 0 and starts
// at its place.
struct Intervals {
  std::uint32_t *start, *size;
};

// What a part is decoded from.
struct Coded {
  std::uint64_t* state;            // [rows*count][lanes]
  const std::uint8_t** word;       // [streams][lanes] the next of each stream's words, 4 bytes each
  const std::uint8_t* const* end;  // [streams][lanes]
};

// Pairs of a sample, a bit each.
struct Sampled {
  std::uint64_t telling, turned;
};

// Kernels for one instruction set.
struct Kernels {
  Products products;
  // to[b][t] = rows[t][b]; to: [blocks][kTile].
  void (*to_columns)(const std::uint32_t* const* rows, std::size_t blocks, std::uint32_t* to);
  // rows[t][b] = from[b][t], of the first `tokens`.
  void (*to_rows)(const std::uint32_t* from, std::size_t blocks, std::size_t tokens,
                  std::uint32_t* const* rows);
  // Intervals of known numbers, and the bits of a code by them. `counts`, unless null:
  // [classes][channels][kCells] to count cells of a number's own |z| in.
  double (*model8)(const Model&, const Layer&, int part, NumberFormat, const Tokens&,
                   const Block<const std::uint8_t>&, Intervals, std::uint32_t* counts);
  double (*model16)(const Model&, const Layer&, int part, NumberFormat, const Tokens&,
                    const Block<const std::uint16_t>&, Intervals, std::uint32_t* counts);
  // Numbers from states and words; false when the words do not fit.
  bool (*decode8)(const Model&, const Layer&, int part, NumberFormat, const Tokens&,
                  const Block<std::uint8_t>&, const Coded&);
  bool (*decode16)(const Model&, const Layer&, int part, NumberFormat, const Tokens&,
                   const Block<std::uint16_t>&, const Coded&);
  // Which of `count` pairs of bf16, at most kTile, tell whether RoPE turned them in bf16, as its
  // grid was four times as coarse or more before; and which of these it turned.
  Sampled (*sample)(const std::uint16_t* first, const std::uint16_t* second, const float* cosine,
                    const float* sine, std::size_t count, bool rounds_products);
  // rANS over a part's intervals, last first. `state` [rows*count][lanes] is taken from what it is
  // after the part to what it is before it; words are written downwards from `words_end`, the last
  // stream's first, and counted in `counts` [streams][lanes]. Returns how many there are.
  std::size_t (*encode)(const Part& part, NumberFormat format, std::size_t group, std::size_t lanes,
                        const std::uint32_t* at, const Tile* tile, std::size_t tiles,
                        Intervals intervals, std::uint64_t* state, std::uint16_t* counts,
                        std::uint32_t* words_end);
};
const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& neon_kernels();
const Kernels& kernels();  // the best there is

// Products of bytes for processors that multiply them better than the instruction set whose vectors
// they have.
extern const Products vnni_products, avx512_vnni_products, dotprod_products, i8mm_products;
extern const MatrixUnit amx_unit;

}  // namespace kvzip::predictive
