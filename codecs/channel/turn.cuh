// Keys before RoPE become those behind it, where they were decoded to (spec.md, "Keys before
// RoPE"): with the bits that native/rotation_kernels.hpp makes of them on a CPU.
#pragma once

#include "channel/device_jobs.hpp"
#include "native/cuda/device.cuh"
#include "native/cuda/place.cuh"

namespace kvzip::channel {

// Two pairs: each word holds two numbers. Sums are rounded, single steps before them are those of
// float32.
KVZIP_DEVICE void turn_words(unsigned& first, unsigned& second, const float (&cos)[2],
                             const float (&sin)[2]) {
  float y1[2], y2[2];
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    const float k1 = cuda::as_float(odd ? first & 0xFFFF0000u : first << 16);
    const float k2 = cuda::as_float(odd ? second & 0xFFFF0000u : second << 16);
    y1[odd] = cuda::difference(cuda::product(k1, cos[odd]), cuda::product(k2, sin[odd]));
    y2[odd] = cuda::sum(cuda::product(k2, cos[odd]), cuda::product(k1, sin[odd]));
  }
  first = cuda::to_bf16(y1[0], y1[1]);
  second = cuda::to_bf16(y2[0], y2[1]);
}

// By cosines and sines of bf16. Products of bf16 have 16 bits, so it is all one whether fp32 holds
// them first; and so it is for sums, which fp32 has more than twice the bits for.
template <bool kEach>
KVZIP_DEVICE void turn_words(unsigned& first, unsigned& second, unsigned cos, unsigned sin) {
  if (kEach) {
    const unsigned a = first, b = second;
    first = cuda::bf16_differences(cuda::bf16_products(a, cos), cuda::bf16_products(b, sin));
    second = cuda::bf16_sums(cuda::bf16_products(b, cos), cuda::bf16_products(a, sin));
  } else {
    const float c[2] = {cuda::as_float(cos << 16), cuda::as_float(cos & 0xFFFF0000u)};
    const float s[2] = {cuda::as_float(sin << 16), cuda::as_float(sin & 0xFFFF0000u)};
    turn_words(first, second, c, s);
  }
}

// Eight pairs, or one, by what lies at `cos` and `sin`: bf16, or float32 if the rounding is 3.
template <int kRounding>
KVZIP_DEVICE void turn(cuda::Four* first, cuda::Four* second, const unsigned char* cos,
                       const unsigned char* sin) {
  cuda::Four a = *first, b = *second;
  const cuda::Four *const c4 = reinterpret_cast<const cuda::Four*>(cos),
                          *const s4 = reinterpret_cast<const cuda::Four*>(sin);
  if (kRounding == 3) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const cuda::Four c = cuda::constant(c4 + half), s = cuda::constant(s4 + half);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float cs[2] = {cuda::as_float(c.v[2 * i]), cuda::as_float(c.v[2 * i + 1])};
        const float sn[2] = {cuda::as_float(s.v[2 * i]), cuda::as_float(s.v[2 * i + 1])};
        turn_words(a.v[2 * half + i], b.v[2 * half + i], cs, sn);
      }
    }
  } else {
    const cuda::Four c = cuda::constant(c4), s = cuda::constant(s4);
#pragma unroll
    for (int i = 0; i < 4; ++i) turn_words<kRounding == 1>(a.v[i], b.v[i], c.v[i], s.v[i]);
  }
  *first = a;
  *second = b;
}
template <int kRounding>
KVZIP_DEVICE void turn(uint16_t* first, uint16_t* second, const unsigned char* cos,
                       const unsigned char* sin) {
  unsigned a = *first, b = *second;
  if (kRounding == 3) {
    const float c[2] = {*reinterpret_cast<const float*>(cos), 0.0f};
    const float s[2] = {*reinterpret_cast<const float*>(sin), 0.0f};
    turn_words(a, b, c, s);
  } else {
    turn_words<kRounding == 1>(a, b, *reinterpret_cast<const uint16_t*>(cos),
                               *reinterpret_cast<const uint16_t*>(sin));
  }
  *first = uint16_t(a);
  *second = uint16_t(b);
}

// Eight pairs side by side become four words of their first and four of their second numbers, and
// back: each two words change their inner halves.
KVZIP_DEVICE void part_pairs(cuda::Four* first, cuda::Four* second) {
  const cuda::Four a = *first, b = *second;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned even = i < 2 ? a.v[2 * i] : b.v[2 * i - 4];
    const unsigned odd = i < 2 ? a.v[2 * i + 1] : b.v[2 * i - 3];
    first->v[i] = (even & 0xFFFFu) | odd << 16;
    second->v[i] = even >> 16 | (odd & 0xFFFF0000u);
  }
}
KVZIP_DEVICE void join_pairs(cuda::Four* first, cuda::Four* second) {
  const cuda::Four a = *first, b = *second;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    cuda::Four* const to = i < 2 ? first : second;
    to->v[2 * i % 4] = (a.v[i] & 0xFFFFu) | b.v[i] << 16;
    to->v[2 * i % 4 + 1] = a.v[i] >> 16 | (b.v[i] & 0xFFFF0000u);
  }
}
KVZIP_DEVICE void part_pairs(uint16_t*, uint16_t*) {}
KVZIP_DEVICE void join_pairs(uint16_t*, uint16_t*) {}

// A thread turns one pair or eight (U) after the other.
template <int kRounding, bool kSideBySide, typename U>
KVZIP_DEVICE void turn_rows(const TurnJob& job, const DevicePart& part) {
  constexpr unsigned kBytes = kRounding == 3 ? 4 : 2;           // of a cosine
  constexpr unsigned kUnit = unsigned(sizeof(U) / 2) * kBytes;  // of those of a unit
  const unsigned units = job.pairs / unsigned(sizeof(U) / 2);   // of a row
  for (unsigned i = cuda::thread(); i < job.rows * units; i += cuda::threads_of_block()) {
    const unsigned unit = i % units, row = job.first_row + i / units;
    const unsigned t = row % job.tokens, bh = row / job.tokens;
    const int64_t place =
        cuda::place_of(part, bh / part.heads, bh % part.heads, job.first_token + t);
    uint16_t* const key = reinterpret_cast<uint16_t*>(part.numbers) + place;
    const unsigned char* const angles = reinterpret_cast<const unsigned char*>(job.angles) +
                                        uint64_t(t) * 2 * job.pairs * kBytes + unit * kUnit;
    U* const first = reinterpret_cast<U*>(key) + (kSideBySide ? 2 * unit : unit);
    U* const second = kSideBySide ? first + 1 : reinterpret_cast<U*>(key + job.pairs) + unit;
    if (kSideBySide) part_pairs(first, second);
    turn<kRounding>(first, second, angles, angles + job.pairs * kBytes);
    if (kSideBySide) join_pairs(first, second);
  }
}

template <int kRounding, bool kSideBySide>
KVZIP_DEVICE void turn_job(const TurnJob& job, const DevicePart& part) {
  const uint64_t strides = uint64_t(part.batch_stride) | uint64_t(part.head_stride) |
                           uint64_t(part.token_stride) | uint64_t(part.page_stride);
  const bool by_sixteen = ((part.numbers | job.angles | 2 * (strides | job.pairs)) & 15) == 0;
  if (by_sixteen) turn_rows<kRounding, kSideBySide, cuda::Four>(job, part);
  else turn_rows<kRounding, kSideBySide, uint16_t>(job, part);
}

KVZIP_KERNEL(128, 8)
channel_turn(const TurnJob* jobs, uint32_t count, const DevicePart* parts) {
  if (cuda::block() >= count) return;
  const TurnJob job = jobs[cuda::block()];
  const DevicePart part = parts[job.part];
  switch (job.rounding) {
    case 1: return turn_job<1, false>(job, part);
    case 2: return turn_job<2, false>(job, part);
    case 3: return turn_job<3, false>(job, part);
    case 4: return turn_job<1, true>(job, part);
    case 5: return turn_job<2, true>(job, part);
    default: return turn_job<3, true>(job, part);
  }
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
        cuda::place_of(part, bh / part.heads, bh % part.heads, job.first_token + row % job.tokens);
    const unsigned pair = at % job.pairs, first = job.side_by_side ? 2 * pair : pair;
    key[first] = uint16_t(found.v[1]);
    key[first + (job.side_by_side ? 1 : job.pairs)] = uint16_t(found.v[1] >> 16);
  }
}

}  // namespace kvzip::channel
