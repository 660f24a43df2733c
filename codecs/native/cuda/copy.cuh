// Numbers from where they lie side by side into a part: strided, or in pages.
#pragma once

#include "native/cuda/place.cuh"

namespace kvzip::cuda {

// Rows first_row ... first_row + rows - 1 of [batch, heads, tokens], of `dim` numbers each. Row (b,
// h, t) is at source + itemsize * (b * batch_stride + h * head_stride + t * token_stride), and goes
// to token first_token + t of the part.
struct CopyJob {
  uint64_t source;
  int64_t batch_stride, head_stride, token_stride;  // in numbers
  uint32_t part;
  uint32_t first_token;
  uint32_t tokens;
  uint32_t first_row, rows;
  uint32_t reserved;
};

// All rows of a job, in units of U; `dim` of them a row.
template <typename U>
KVZIP_DEVICE void copy_rows(const CopyJob& job, const DevicePart& part, unsigned dim,
                            unsigned per_unit) {
  const unsigned count = job.rows * dim;
  for (unsigned i = thread(); i < count; i += threads_of_block()) {
    const unsigned unit = i % dim, row = job.first_row + i / dim;
    const unsigned t = row % job.tokens, bh = row / job.tokens;
    const unsigned h = bh % part.heads, b = bh / part.heads;
    const int64_t from = int64_t(b) * job.batch_stride + int64_t(h) * job.head_stride +
                         int64_t(t) * job.token_stride;
    const int64_t to = place_of(part, b, h, job.first_token + t);
    const U* source =
        reinterpret_cast<const U*>(job.source + uint64_t(from) * (sizeof(U) / per_unit));
    U* target = reinterpret_cast<U*>(part.numbers + uint64_t(to) * (sizeof(U) / per_unit));
    target[unit] = source[unit];
  }
}

// Whether all that is added to an address keeps it at multiples of 16.
template <typename T>
KVZIP_DEVICE bool by_sixteen(const CopyJob& job, const DevicePart& part) {
  const uint64_t all = uint64_t(part.batch_stride) | uint64_t(part.head_stride) |
                       uint64_t(part.token_stride) | uint64_t(part.page_stride) |
                       uint64_t(job.batch_stride) | uint64_t(job.head_stride) |
                       uint64_t(job.token_stride) | part.dim;
  return ((part.numbers | job.source | all * sizeof(T)) & 15) == 0;
}

template <typename T>
KVZIP_DEVICE void copy_job(const CopyJob* jobs, unsigned count, const DevicePart* parts) {
  if (block() >= count) return;
  const CopyJob job = jobs[block()];
  const DevicePart part = parts[job.part];
  constexpr unsigned kIn16 = 16 / sizeof(T);
  if (by_sixteen<T>(job, part)) copy_rows<Four>(job, part, part.dim / kIn16, kIn16);
  else copy_rows<T>(job, part, part.dim, 1);
}

#define KVZIP_COPY(itemsize, T)                                                              \
  KVZIP_KERNEL(128, 8)                                                                       \
  copy_##itemsize(const CopyJob* jobs, uint32_t count, const DevicePart* parts, uint32_t*) { \
    copy_job<T>(jobs, count, parts);                                                         \
  }
KVZIP_COPY(1, uint8_t)
KVZIP_COPY(2, uint16_t)
KVZIP_COPY(4, uint32_t)
KVZIP_COPY(8, uint64_t)
#undef KVZIP_COPY

}  // namespace kvzip::cuda
