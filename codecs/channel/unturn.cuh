// Keys behind RoPE become those before it (spec.md, "Keys before RoPE"). A thread looks for one
// pair as a lane of native/rotation_kernels.hpp does, attempt for attempt and step for step, so
// that of several that turn to the same keys it finds the same.
#pragma once

#include "channel/device_jobs.hpp"
#include "native/cuda/device.cuh"
#include "native/cuda/place.cuh"

namespace kvzip::channel {

KVZIP_DEVICE float magnitude(float v) { return cuda::as_float(cuda::bits_of(v) & 0x7FFFFFFFu); }
KVZIP_DEVICE float power_of(float v) { return cuda::as_float(cuda::bits_of(v) & 0x7F800000u); }
// The second where either is no number.
KVZIP_DEVICE float larger_of(float a, float b) { return a > b ? a : b; }
KVZIP_DEVICE float smaller_of(float a, float b) { return a < b ? a : b; }
// To bf16, next to 1.5 * 2^16 times its power of two.
KVZIP_DEVICE float rounded(float v) {
  const float far = cuda::as_float((cuda::bits_of(v) & 0x7F800000u) + 0x08400000u);
  return cuda::difference(cuda::sum(v, far), far);
}
KVZIP_DEVICE float stepped(float v, int steps) {
  return cuda::as_float(cuda::bits_of(v) + (unsigned(steps) << 16));
}
// Where both are nothing, or neither so small nor so large that an intermediate could be.
KVZIP_DEVICE bool ordinary(float v, float w) {
  constexpr unsigned kLeast = 0x2B800001u, kEnd = 0x5D800000u;  // from 2^-40 on, up to 2^60
  const unsigned a = cuda::bits_of(magnitude(v)), b = cuda::bits_of(magnitude(w));
  return a - 1 >= kLeast - 1 && b - 1 >= kLeast - 1 && a < kEnd && b < kEnd;
}

// `Search` of native/rotation_kernels.hpp.
template <bool kEach>
class Search {
 public:
  KVZIP_DEVICE Search(float y1, float y2, float cos, float sin) {
    const float over = cuda::quotient(
        1.0f, cuda::sum(cuda::signed_product(cos, cos), cuda::signed_product(sin, sin)));
    const float a = cuda::signed_product(
        cuda::sum(cuda::signed_product(y1, cos), cuda::signed_product(y2, sin)), over);
    const float b = cuda::signed_product(
        cuda::difference(cuda::signed_product(y2, cos), cuda::signed_product(y1, sin)), over);
    swap_ = magnitude(b) > magnitude(a);
    wide_ = rounded(swap_ ? b : a);
    y1_ = swap_ ? y2 : y1;
    y2_ = swap_ ? y1 : y2;
    cos_ = cos;
    sin_ = swap_ ? cuda::as_float(cuda::bits_of(sin) ^ 0x80000000u) : sin;
    over1_ = cuda::quotient(-1.0f, sin_);
    over2_ = cuda::quotient(1.0f, cos_);
    room1_ = cuda::signed_product(half_step(y1_), magnitude(over1_));
    room2_ = cuda::signed_product(half_step(y2_), magnitude(over2_));
  }

  // Whether there are numbers that turn to y1 and y2.
  KVZIP_DEVICE bool run() {
    take(0);
    if (attempt(0)) return true;
#pragma unroll 1
    for (int i = 0; i < 5; ++i) {
      const int steps = i == 2 ? 0 : (i < 2 ? 1 : 2) * (i % 3 ? -1 : 1);  // 1, -1, 0, 2, -2
      take(steps);
      if ((steps && attempt(0)) || attempt(1) || attempt(-1)) return true;
    }
    return false;
  }

  // What was tried, as bf16.
  KVZIP_DEVICE unsigned k1() const { return cuda::bits_of(swap_ ? tried_ : taken_) >> 16; }
  KVZIP_DEVICE unsigned k2() const { return cuda::bits_of(swap_ ? taken_ : tried_) >> 16; }

 private:
  KVZIP_DEVICE static float half_step(float v) {
    return cuda::signed_product(power_of(v), 0x1p-8f);
  }
  KVZIP_DEVICE static float product(float a, float b) {
    const float found = cuda::signed_product(a, b);
    return kEach ? rounded(found) : found;
  }
  KVZIP_DEVICE void take(int steps) {
    taken_ = stepped(wide_, steps);
    part1_ = product(taken_, cos_);
    part2_ = product(taken_, sin_);
    const float at1 = cuda::signed_product(cuda::difference(y1_, part1_), over1_);
    const float at2 = cuda::signed_product(cuda::difference(y2_, part2_), over2_);
    const float low = larger_of(cuda::difference(at1, room1_), cuda::difference(at2, room2_));
    const float high = smaller_of(cuda::sum(at1, room1_), cuda::sum(at2, room2_));
    const float middle = cuda::signed_product(cuda::sum(low, high), 0.5f);
    const float aside = cuda::signed_product(cuda::difference(high, low), 0.25f);
    narrow_ = rounded(magnitude(middle) < aside ? cuda::sum(middle, aside) : middle);
  }
  KVZIP_DEVICE bool attempt(int steps) {
    tried_ = stepped(narrow_, steps);
    const float z1 = rounded(cuda::difference(part1_, product(tried_, sin_)));
    const float z2 = rounded(cuda::sum(part2_, product(tried_, cos_)));
    return cuda::bits_of(z1) == cuda::bits_of(y1_) && cuda::bits_of(z2) == cuda::bits_of(y2_) &&
           ordinary(taken_, tried_);
  }

  float y1_, y2_, cos_, sin_, over1_, over2_, room1_, room2_, wide_;
  float taken_, part1_, part2_, narrow_, tried_;
  bool swap_;
};

template <bool kEach>
KVZIP_DEVICE bool unturn(unsigned* first, unsigned* second, float cos, float sin) {
  Search<kEach> search(cuda::as_float(*first << 16), cuda::as_float(*second << 16), cos, sin);
  if (!search.run()) return false;
  *first = search.k1();
  *second = search.k2();
  return true;
}

// A thread does one pair after the other, or one of the numbers that are not turned.
template <bool kEach>
KVZIP_DEVICE void unturn_rows(const UnturnJob& job, const DevicePart& part, const DevicePart& out) {
  const bool side_by_side = job.rounding > 3;
  const unsigned others = part.dim - 2 * job.pairs, units = job.pairs + others;
  MissingPairs* const missing = reinterpret_cast<MissingPairs*>(job.missing);
  for (unsigned i = cuda::thread(); i < job.rows * units; i += cuda::threads_of_block()) {
    const unsigned unit = i % units, row = job.first_row + i / units;
    const unsigned t = row % job.tokens, bh = row / job.tokens;
    const unsigned b = bh / part.heads, h = bh % part.heads, token = job.first_token + t;
    const uint16_t* const key =
        reinterpret_cast<const uint16_t*>(part.numbers) + cuda::place_of(part, b, h, token);
    uint16_t* const to =
        reinterpret_cast<uint16_t*>(out.numbers) + cuda::place_of(out, b, h, token);
    if (unit >= job.pairs) {
      to[job.pairs + unit] = key[job.pairs + unit];
      continue;
    }
    const float* const cos =
        reinterpret_cast<const float*>(job.angles) + uint64_t(t) * 2 * job.pairs + unit;
    const unsigned at1 = side_by_side ? 2 * unit : unit;
    const unsigned at2 = at1 + (side_by_side ? 1 : job.pairs);
    const unsigned y1 = key[at1], y2 = key[at2];
    unsigned k1 = y1, k2 = y2;
    if (!unturn<kEach>(&k1, &k2, cuda::constant(cos), cuda::constant(cos + job.pairs))) {
      const unsigned place = cuda::fetch_add(&missing->count, 1);
      if (place < job.most)
        reinterpret_cast<cuda::Two*>(missing + 1)[place] = {
            {(bh * job.all + token) * job.pairs + unit, y1 | y2 << 16}};
    }
    to[at1] = uint16_t(k1);
    to[at2] = uint16_t(k2);
  }
}

KVZIP_KERNEL(128, 8)
channel_unturn(const UnturnJob* jobs, uint32_t count, const DevicePart* parts) {
  if (cuda::block() >= count) return;
  const UnturnJob job = jobs[cuda::block()];
  const DevicePart part = parts[job.part], out = parts[job.out];
  if (job.rounding % 3 == 1) unturn_rows<true>(job, part, out);
  else unturn_rows<false>(job, part, out);
}

}  // namespace kvzip::channel
