// What the host tells the kernels of a GPU: plain numbers of fixed size, the same for C++ here, for
// nvcc, NVRTC and the shim. Addresses are the device's. The host has checked all of it: kernels
// trust it, and trust nothing that stands in a stream.
#pragma once

#include "native/cuda/part.hpp"

namespace kvzip::channel {

// How a channel uses a shape, as `Channel` of kernels.hpp: 8 bytes. `shape` is kConstantShape where
// every number of the channel is `number`; else `number` is its base.
constexpr uint32_t kConstantShape = 0xFFFFFFFFu;
struct DeviceChannel {
  uint32_t shape;
  uint32_t number;
};

using cuda::DevicePart;
// Its `tables`: decoding, address of uint32 [shapes][32][2], `entry` of kernels.hpp, a bucket's own
// beside its other; at least one shape, whatever it is.

// One stream of a coded block (spec.md), all of which one warp does.
struct StreamJob {
  uint64_t stream;     // address of its first byte: a multiple of 16
  uint32_t part;       // index of its DevicePart
  uint32_t first_token;  // of the block, counted in the part
  uint32_t tokens;       // of the block
  uint32_t first_strip, strips;
  uint32_t lanes;      // states: tokens of the group that the first strip belongs to
  uint32_t mantissas;  // bytes of them as they are stored
  uint32_t words, escapes;
  uint32_t row;        // whose flag is set when the stream is damaged
};

}  // namespace kvzip::channel
