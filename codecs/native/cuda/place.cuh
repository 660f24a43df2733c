// Where numbers of a part lie.
#pragma once

#include "native/cuda/device.cuh"
#include "native/cuda/device_part.hpp"

namespace kvzip::cuda {

// `place` of DevicePart, in numbers.
KVZIP_DEVICE int64_t place_of(const DevicePart& part, unsigned token) {
  if (!part.pages) return int64_t(token) * part.token_stride;
  const int32_t* pages = reinterpret_cast<const int32_t*>(part.pages);
  return int64_t(constant(pages + token / part.page_tokens)) * part.page_stride +
         int64_t(token % part.page_tokens) * part.token_stride;
}
// How far number [b, h, t, 0] of a part is from its first, in numbers.
KVZIP_DEVICE int64_t place_of(const DevicePart& part, unsigned b, unsigned h, unsigned t) {
  return int64_t(b) * part.batch_stride + int64_t(h) * part.head_stride + place_of(part, t);
}

}  // namespace kvzip::cuda
