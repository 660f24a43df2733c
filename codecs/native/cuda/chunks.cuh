// What a library says of chunks that it decoded, as flags of ours.
#pragma once

#include "native/cuda/device.cuh"
#include "native/cuda/device_part.hpp"

namespace kvzip::cuda {

struct ChunkJob {
  uint64_t status;    // address of an int32: 0 is good
  uint64_t decoded;   // address of a uint64: how many bytes were written
  uint64_t expected;  // how many there should be
  uint32_t row;       // whose flag
  uint32_t reserved;
};

// A thread each.
KVZIP_KERNEL(128, 1)
check_chunks(const ChunkJob* jobs, uint32_t count, const DevicePart*, uint32_t* flags) {
  const unsigned index = block() * threads_of_block() + thread();
  if (index >= count) return;
  const ChunkJob job = jobs[index];
  const bool good = *reinterpret_cast<const int32_t*>(job.status) == 0 &&
                    *reinterpret_cast<const uint64_t*>(job.decoded) == job.expected;
  if (!good) set_flag(flags + job.row);
}

}  // namespace kvzip::cuda
