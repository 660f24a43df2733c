// What the host tells the kernels of a GPU: plain numbers of fixed size, the same for C++ here, for
// nvcc, NVRTC and the shim. Addresses are the device's. The host has checked all of it: kernels
// trust it, and trust nothing that stands in a stream.
#pragma once

#ifndef __CUDACC_RTC__
#include <cstdint>
#else
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#endif

namespace kvzip::channel {

// How a channel uses a shape, as `Channel` of kernels.hpp: 8 bytes. `shape` is kConstantShape where
// every number of the channel is `number`; else `number` is its base.
constexpr uint32_t kConstantShape = 0xFFFFFFFFu;
struct DeviceChannel {
  uint32_t shape;
  uint32_t number;
};

// One layer's keys or values, and where they lie or go: number [b, h, t, c] at
//   numbers + itemsize * (b * batch_stride + h * head_stride + c + place(t))
//   place(t) = t * token_stride                                                   without `pages`
//            = pages[t / page_tokens] * page_stride + t % page_tokens * token_stride     with them
// where t counts from the first token of the part (not of the block).
struct DevicePart {
  uint64_t numbers;    // address of [0, 0, 0, 0]
  uint64_t channels;   // address of DeviceChannel [heads][dim]
  uint64_t tables;     // decoding: address of uint32 [shapes][64], `entry` of kernels.hpp;
                       // encoding: address of DeviceEncoder [shapes]
  uint64_t pages;      // address of int32 [pages], or 0
  int64_t batch_stride, head_stride, token_stride, page_stride;  // in numbers
  uint32_t page_tokens;
  uint32_t batch, heads, dim;
};

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
