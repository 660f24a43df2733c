// Keys before RoPE become those behind it, where they were decoded to (spec.md, "Keys before
// RoPE"): with the bits that native/rotation_kernels.hpp makes of them on a CPU.
#pragma once

#include "channel/device_jobs.hpp"
#include "native/cuda/device.cuh"
#include "native/cuda/place.cuh"

namespace kvzip::channel {

// Two pairs: each word holds two numbers. Products of bf16 have 16 bits, so it is all one whether
// fp32 holds them first; and so it is for sums, which fp32 has more than twice the bits for.
template <bool kEach>
KVZIP_DEVICE void turn_words(unsigned& first, unsigned& second, unsigned cos, unsigned sin) {
  const unsigned a = first, b = second;
  if (kEach) {
    first = cuda::bf16_differences(cuda::bf16_products(a, cos), cuda::bf16_products(b, sin));
    second = cuda::bf16_sums(cuda::bf16_products(b, cos), cuda::bf16_products(a, sin));
    return;
  }
  float y1[2], y2[2];
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const auto number = [&](unsigned word) {
      return cuda::as_float(odd ? word & 0xFFFF0000u : word << 16);
    };
    const float k1 = number(a), k2 = number(b), c = number(cos), s = number(sin);
    y1[odd] = cuda::difference(cuda::product(k1, c), cuda::product(k2, s));
    y2[odd] = cuda::sum(cuda::product(k2, c), cuda::product(k1, s));
  }
  first = cuda::to_bf16(y1[0], y1[1]);
  second = cuda::to_bf16(y2[0], y2[1]);
}

// Eight pairs, or one.
template <bool kEach>
KVZIP_DEVICE void turn(cuda::Four* first, cuda::Four* second, const cuda::Four* cos,
                       const cuda::Four* sin) {
  cuda::Four a = *first, b = *second;
  const cuda::Four c = cuda::constant(cos), s = cuda::constant(sin);
#pragma unroll
  for (int i = 0; i < 4; ++i) turn_words<kEach>(a.v[i], b.v[i], c.v[i], s.v[i]);
  *first = a;
  *second = b;
}
template <bool kEach>
KVZIP_DEVICE void turn(uint16_t* first, uint16_t* second, const uint16_t* cos,
                       const uint16_t* sin) {
  unsigned a = *first, b = *second;
  turn_words<kEach>(a, b, *cos, *sin);
  *first = uint16_t(a);
  *second = uint16_t(b);
}

// A thread turns one pair or eight (U) after the other.
template <bool kEach, typename U>
KVZIP_DEVICE void turn_rows(const TurnJob& job, const DevicePart& part) {
  const unsigned units = job.pairs / unsigned(sizeof(U) / 2);  // of a row
  for (unsigned i = cuda::thread(); i < job.rows * units; i += cuda::threads_of_block()) {
    const unsigned unit = i % units, row = job.first_row + i / units;
    const unsigned t = row % job.tokens, bh = row / job.tokens;
    const int64_t place =
        cuda::place_of(part, bh / part.heads, bh % part.heads, job.first_token + t);
    uint16_t* const key = reinterpret_cast<uint16_t*>(part.numbers) + place;
    const uint16_t* const angles =
        reinterpret_cast<const uint16_t*>(job.angles) + uint64_t(t) * 2 * job.pairs;
    turn<kEach>(reinterpret_cast<U*>(key) + unit, reinterpret_cast<U*>(key + job.pairs) + unit,
                reinterpret_cast<const U*>(angles) + unit,
                reinterpret_cast<const U*>(angles + job.pairs) + unit);
  }
}

template <bool kEach>
KVZIP_DEVICE void turn_job(const TurnJob& job, const DevicePart& part) {
  const uint64_t strides = uint64_t(part.batch_stride) | uint64_t(part.head_stride) |
                           uint64_t(part.token_stride) | uint64_t(part.page_stride);
  const bool by_sixteen = ((part.numbers | job.angles | 2 * (strides | job.pairs)) & 15) == 0;
  if (by_sixteen) turn_rows<kEach, cuda::Four>(job, part);
  else turn_rows<kEach, uint16_t>(job, part);
}

KVZIP_KERNEL(128, 8)
channel_turn(const TurnJob* jobs, uint32_t count, const DevicePart* parts) {
  if (cuda::block() >= count) return;
  const TurnJob job = jobs[cuda::block()];
  const DevicePart part = parts[job.part];
  if (job.rounding == 1) turn_job<true>(job, part);
  else turn_job<false>(job, part);
}

KVZIP_KERNEL(128, 8)
channel_exceptions(const ExceptionJob* jobs, uint32_t count, const DevicePart* parts,
                   uint32_t* flags) {
  if (cuda::block() >= count) return;
  const ExceptionJob job = jobs[cuda::block()];
  const DevicePart part = parts[job.part];
  const uint64_t all = uint64_t(part.batch) * part.heads * job.tokens * job.pairs;
  const cuda::Two* const exceptions = reinterpret_cast<const cuda::Two*>(job.exceptions);
  for (unsigned i = cuda::thread(); i < job.count; i += cuda::threads_of_block()) {
    const unsigned n = job.first + i;
    const cuda::Two found = cuda::constant(exceptions + n);
    const unsigned at = found.v[0];
    if (at >= all || (n && at <= cuda::constant(exceptions + n - 1).v[0])) {
      cuda::set_flag(flags + job.row);
      continue;
    }
    const unsigned row = at / job.pairs, bh = row / job.tokens;
    uint16_t* const key =
        reinterpret_cast<uint16_t*>(part.numbers) +
        cuda::place_of(part, bh / part.heads, bh % part.heads, job.first_token + row % job.tokens) +
        at % job.pairs;
    key[0] = uint16_t(found.v[1]);
    key[job.pairs] = uint16_t(found.v[1] >> 16);
  }
}

}  // namespace kvzip::channel
