// Where numbers lie in a GPU's memory: plain structures of fixed size, the same for C++ here, for
// nvcc, NVRTC and the shim. Addresses are the device's. The host has checked all of it, and kernels
// trust it.
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

namespace kvzip::cuda {

// One layer's keys or values: number [b, h, t, c] lies at
//   numbers + itemsize * (b * batch_stride + h * head_stride + c + place(t))
//   place(t) = t * token_stride                                                   without `pages`
//            = pages[t / page_tokens] * page_stride + t % page_tokens * token_stride     with them
// where t counts from the first token of the part (not of a block).
struct DevicePart {
  uint64_t numbers;   // address of [0, 0, 0, 0]
  uint64_t channels;  // `channel`: address of DeviceChannel [heads][dim]
  uint64_t tables;    // `channel`: see channel/device_jobs.hpp
  uint64_t pages;     // address of int32 [pages], or 0
  int64_t batch_stride, head_stride, token_stride, page_stride;  // in numbers
  uint32_t page_tokens;
  uint32_t batch, heads, dim;
};

}  // namespace kvzip::cuda
