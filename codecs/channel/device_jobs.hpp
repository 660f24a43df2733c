// What the host tells the kernels of a GPU: plain numbers of fixed size, the same for C++ here, for
// nvcc, NVRTC and the shim. Addresses are the device's. The host has checked all of it: kernels
// trust it, and trust nothing that stands in a stream.
#pragma once

#include "native/cuda/device_part.hpp"

namespace kvzip::channel {

// How a channel uses a shape, as `Channel` of kernels.hpp: 8 bytes. `shape` is kConstantShape where
// every number of the channel is `number`; else `number` is its base.
constexpr uint32_t kConstantShape = 0xFFFFFFFFu;
struct DeviceChannel {
  uint32_t shape;
  uint32_t number;
};

using cuda::DevicePart;
// Its `tables`: encoding, address of DeviceEncoder [shapes]; decoding, address of uint32
// [shapes][32][2], `entry` of kernels.hpp, a bucket's own beside its other; at least one shape,
// whatever it is.

// One stream of a coded block (spec.md), all of which one warp does.
struct StreamJob {
  uint64_t stream;       // address of its first byte: a multiple of 16
  uint32_t part;         // index of its DevicePart
  uint32_t first_token;  // of the block, counted in the part
  uint32_t tokens;       // of the block
  uint32_t first_strip, strips;
  uint32_t lanes;      // states: tokens of the group that the first strip belongs to
  uint32_t mantissas;  // bytes of them as they are stored
  uint32_t words, escapes;
  uint32_t row;  // whose flag is set when the stream is damaged
};

// Keys of a decoded block that are to be turned (spec.md, "Keys before RoPE"): rows first_row ...
// first_row + rows - 1 of [batch, heads, tokens].
struct TurnJob {
  uint64_t angles;  // address of [tokens, 2, pairs], cosines and sines: a multiple of 4
  uint32_t part;
  uint32_t first_token, tokens;  // counted in the part
  uint32_t first_row, rows;
  uint32_t pairs;     // at least 1, and two numbers each within `dim`
  uint32_t rounding;  // 1, of each product and their sum; 2, of the sum, and angles are of bf16; 3,
                      // of the sum, and angles are of float32; 4, 5 and 6, likewise, of pairs side
                      // by side
  uint32_t reserved;
};
// Pairs of such a block that nothing turns to: exceptions `first` ... first + count - 1 of all that
// it has. What stands in them is not checked yet.
struct ExceptionJob {
  uint64_t exceptions;  // address of the block's first, 8 bytes each: a multiple of 8
  uint32_t first, count;
  uint32_t part;
  uint32_t first_token, tokens;  // of the block, counted in the part
  uint32_t pairs;
  uint32_t row;           // whose flag is set when they are damaged
  uint32_t side_by_side;  // whether the two numbers of a pair are, or else `pairs` apart
};

// Keys of which those before RoPE are looked for: rows first_row ... first_row + rows - 1 of
// [batch, heads, tokens].
struct UnturnJob {
  uint64_t angles;               // address of float32 [tokens, 2, pairs], cosines and sines
  uint64_t missing;              // address of MissingPairs
  uint32_t part, out;            // where the keys are, and where those before RoPE go
  uint32_t first_token, tokens;  // counted in both
  uint32_t first_row, rows;
  uint32_t pairs;     // at least 1, and two numbers each within `dim`
  uint32_t rounding;  // as of TurnJob
  uint32_t all;       // tokens of the part
  uint32_t most;      // so many missing pairs there is room for
};
// Pairs that nothing turns to: how many, which may be more than there is room for, then of each,
// in no order, its number in [batch, heads, all tokens, pairs] and its own two numbers.
struct MissingPairs {
  uint32_t count, reserved;
  // uint32_t pair[most][2]
};

// What a step of the encoder looks up, 32 numbers a row. Lanes hold one of each.
//   map     symbol of exponent i (counted from the shape's first) of positive numbers, 6 bits, of
//           which the upper says that there is one; of negative ones, 6 bits from bit 8 on; how
//           many pieces begin before rank 32 i, less 1, plus 1, 8 bits from bit 16 on; the escape's
//           symbol, or 255, from bit 24 on
//   symbol  frequency, 11 bits; where its ranks begin, 10 bits
//   inverse floor(2^32 / frequency), at most 2^32 - 1
//   begins  whether a piece of slots begins at rank 32 i + j, in bit j
//   shift   slot less rank, mod 2^16, of pieces 2 i and 2 i + 1
struct DeviceEncoder {
  uint32_t map[32], symbol[32], inverse[32], begins[32], shift[32];
};

// One stream to encode. Its room: states; mantissas, as they are stored and 256 bytes
// more; each up to a multiple of 16; then uint16 for `numbers` words and for numbers / 4 escapes,
// both written from their ends downwards.
struct EncodeJob {
  uint64_t room;  // address: a multiple of 16
  uint32_t part;
  uint32_t first_token, tokens;
  uint32_t first_strip, strips;
  uint32_t lanes;
  uint32_t mantissas;  // bytes of them as they are stored
  uint32_t numbers;    // that the stream has
  uint32_t row;        // of EncodedStream
};
// What became of it: how many words, escapes and states of four bytes, or that the tables cannot
// code it.
struct EncodedStream {
  uint32_t words, escapes, failed, tops;
};

// An encoded stream on its way from its room to its place in a block.
struct PlaceJob {
  uint64_t room;    // as EncodeJob
  uint64_t stream;  // address: a multiple of 16
  uint32_t lanes, mantissas, numbers, words, escapes, reserved;
};

}  // namespace kvzip::channel
