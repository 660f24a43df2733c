// What the host tells the kernels of a GPU: plain numbers of fixed size, the same for C++ here, for
// NVRTC and the shim, and laid out by gpu_model.py and gpu.py. Addresses are the device's. The host
// has checked all of it: kernels trust it, and trust nothing that stands in a block's streams.
//
// A layer's channels stand in columns: keys in their coding order from column 0 on, values from the
// next multiple of 32 on; there are columns up to a multiple of 64.
#pragma once

#include "native/cuda/device_part.hpp"

namespace kvzip::predictive {

// What a channel has for itself, in one region.
struct alignas(16) DeviceChannel {
  int32_t bias, weight_scale, within_scale, mean;
  int32_t input_scale;
  short unit;            // its power of two
  unsigned short shape;  // which density
  int32_t inverse[2];  // of tokens that the layer's table does not know, and of those that it does
};

// A cell of a density (kernels.hpp), and where a search begins: |z| at the cell's start, and how
// much of it a share is.
struct alignas(16) DeviceCell {
  int32_t from, rise;
  float start, slope;
};

// Columns of the input that come from one layer: `width` of them, a multiple of 64, from byte
// `start` of a token's row on.
struct DeviceInput {
  uint32_t start, width;
};

// One layer of a profile.
struct DeviceLayer {
  uint64_t channels;  // DeviceChannel [regions][columns]
  uint64_t places;    // uint32 [columns] the head, 16 bits, above the number within it
  uint64_t weight;    // [regions][columns / 16][inputs / 64][2][32 threads] 16 bytes, products.cuh
  uint64_t far[2];    // of keys and values: [regions][far_steps][32 threads] 8 bytes, chain.cuh
  uint64_t far_start[2];  // uint32 [groups + 1] in steps
  uint64_t near[2];       // [regions][groups][group][near_words] 4 bytes
  uint64_t
      pair_tables;  // int32 [2 * regions][pairs][3][32]: inverse of the first, the second, slope
  uint64_t step;    // uint64 [pairs of a head]
  uint64_t table;   // of tokens: int16 or int8 [table_rows][columns]
  uint64_t centre;  // int8 [regions][inputs], for more than one region
  uint64_t centre_bias;  // int32 [regions]
  uint64_t inputs;       // DeviceInput [input_count]
  uint64_t sine;         // int16 [4096]
  uint64_t cells;        // DeviceCell [shape_count][64]
  uint64_t guesses;      // uint8 [shape_count][512], density.cuh
  uint32_t far_steps[2];
  uint32_t channel_count[2], first_column[2], heads[2], dim[2];
  uint32_t columns, regions, pairs;  // pairs of a head
  uint32_t input_count, input_width;
  uint32_t output;  // byte of a token's row where what it tells later layers begins
  uint32_t table_rows, table_bytes;  // of a number of the table; 0: there is none
  uint32_t group, lanes, near_words, shape_count;
  uint32_t row_bytes;       // of a token's inputs
  uint32_t residual_bytes;  // of a token's residuals in memory
  uint32_t side_by_side;    // 1: the pairs of a head are 2 i and 2 i + 1; 0: i and i + pairs
  uint32_t reserved;
};

// Tokens of one region, at most 32.
struct DeviceTile {
  uint32_t start, count;  // places in the order of all tokens
  uint32_t region, reserved;
};

// One token range at one part of a layer. Memory that goes with the range from layer to layer is
// named first.
struct RangeJob {
  uint64_t layer;     // DeviceLayer
  uint64_t inputs;    // int8 [tokens][row_bytes] what layers tell those after them
  uint64_t residual;  // int8 [tiles * 32][residual_bytes]
  uint64_t products;  // int32 [tiles][columns][32]
  uint64_t energy;    // int32 [tokens]
  uint64_t states;    // uint64 [tokens][lanes]
  uint64_t entries;   // int32 [tokens] a token's row in tables, or -1
  uint64_t regions;   // uint8 [tokens]
  uint64_t at;        // uint32 [tokens] in their coding order; 0: as they come
  uint64_t tiles;     // uint32 [4], of which the first says how many there are; DeviceTile [...]
  uint64_t first_states;  // likewise, of the range's first coded block; else 0
  uint64_t low;           // the lower halves of numbers of 32 bits, in the block
  uint64_t header;        // of the block, where counts of words begin
  uint64_t counts;        // the rest of them, in the block; 0: numbers are there already
  uint64_t bytes;         // of counts, but for the header's, and words
  uint64_t position;      // of the first token
  uint64_t rotation;      // float [row_tokens][2][pairs] cosines and sines, where pairs may be as
                          // they were before RoPE; else 0
  uint32_t tokens, row_tokens;  // of all rows of the batch, of one
  uint32_t part;                // index of its DevicePart
  uint32_t first_token;         // of the block, counted in the part
  uint32_t values;              // 1: the part is the layer's values, 0: its keys
  uint32_t begins, ends;        // whether energies begin here; whether all states must be at rest
  uint32_t row;                 // whose flag is set when the block is damaged
  uint32_t rounds_products;     // whether RoPE rounds them, too; else their sums alone
  uint32_t reserved;
};

}  // namespace kvzip::predictive
