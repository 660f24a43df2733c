// Where a token's numbers lie.
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

}  // namespace kvzip::cuda
