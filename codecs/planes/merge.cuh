// Planes of bytes or bits put together again (spec.md), and into place.
#pragma once

#include "native/cuda/copy.cuh"

namespace kvzip::planes {

using namespace kvzip::cuda;

// Channels first_channel ... first_channel + 31 and tokens from..to (of the block) of one batch row
// and head; `number` is where [b, h, 0, 0] of the block stands among the numbers of a plane.
struct MergeJob {
  uint64_t planes;  // address of uint64 [planes], each the address of one, the highest first
  uint64_t number;
  uint32_t part;
  uint32_t first_token;  // of the block, counted in the part
  uint32_t batch, head;
  uint32_t first_channel;
  uint32_t from, to;
  uint32_t channel_step, token_step;  // between neighbours, in numbers of a plane
  uint32_t reserved;
};

// What shifts of a T are done in.
template <typename T>
struct WideOf {
  using type = uint32_t;
};
template <>
struct WideOf<uint64_t> {
  using type = uint64_t;
};

template <typename T, bool kBits>
KVZIP_DEVICE T merged(const uint64_t* planes, uint64_t i) {
  constexpr unsigned kPlanes = kBits ? 8 * sizeof(T) : sizeof(T);
  using Wide = typename WideOf<T>::type;
  Wide v = 0;
#pragma unroll
  for (unsigned p = 0; p < kPlanes; ++p) {
    const uint8_t* plane = reinterpret_cast<const uint8_t*>(planes[p]);
    if (kBits) v = v << 1 | (plane[i >> 3] >> (i & 7) & 1u);
    else v = v << 8 | plane[i];
  }
  return T(v);
}

// Lanes are channels, so that neighbours are written by neighbours.
template <typename T, bool kBits>
KVZIP_DEVICE void merge_job(const MergeJob* jobs, unsigned count, const DevicePart* parts) {
  if (block() >= count) return;
  const MergeJob job = jobs[block()];
  const DevicePart part = parts[job.part];
  const unsigned channel = job.first_channel + thread() % kWarp;
  if (channel >= part.dim) return;
  const uint64_t* planes = reinterpret_cast<const uint64_t*>(job.planes);
  T* numbers = reinterpret_cast<T*>(part.numbers);
  // Each warp has tokens of its own that follow each other.
  const unsigned warps = threads_of_block() / kWarp, each = (job.to - job.from + warps - 1) / warps;
  unsigned t = job.from + thread() / kWarp * each;
  const unsigned end = t + each < job.to ? t + each : job.to;
  for (; t < end; ++t) {
    const uint64_t i =
        job.number + uint64_t(channel) * job.channel_step + uint64_t(t) * job.token_step;
    numbers[place_of(part, job.batch, job.head, job.first_token + t) + channel] =
        merged<T, kBits>(planes, i);
  }
}

#define KVZIP_MERGE(what, bits, itemsize, T)                                               \
  KVZIP_KERNEL(128, 8)                                                                     \
  merge_##what##_##itemsize(const MergeJob* jobs, uint32_t count, const DevicePart* parts, \
                            uint32_t*) {                                                   \
    merge_job<T, bits>(jobs, count, parts);                                                \
  }
KVZIP_MERGE(byte, false, 1, uint8_t)
KVZIP_MERGE(byte, false, 2, uint16_t)
KVZIP_MERGE(byte, false, 4, uint32_t)
KVZIP_MERGE(byte, false, 8, uint64_t)
KVZIP_MERGE(bit, true, 1, uint8_t)
KVZIP_MERGE(bit, true, 2, uint16_t)
KVZIP_MERGE(bit, true, 4, uint32_t)
KVZIP_MERGE(bit, true, 8, uint64_t)
#undef KVZIP_MERGE

}  // namespace kvzip::planes
