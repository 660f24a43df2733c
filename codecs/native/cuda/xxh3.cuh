// XXH3-64 (github.com/Cyan4973/xxHash, specification in doc/xxhash_spec.md) of blocks of numbers
// where they lie, in the order of [batch, heads, tokens, dim]. Above 240 bytes the algorithm adds
// up pieces of 1,024 bytes and scrambles the sums after each. Sums of pieces do not need each
// other, so a first kernel makes them side by side; a second puts those of a block together.
#pragma once

#include "native/cuda/place.cuh"

namespace kvzip::cuda {

constexpr unsigned kPieceBytes = 1024, kStripeBytes = 64;
constexpr unsigned kSumsThreads = 128, kDigestThreads = 32;

struct DigestJob {
  uint64_t sums;   // address of room for uint64 [pieces][8], pieces = ceil(bytes / 1024)
  uint64_t bytes;  // of the block's numbers: more than 240
  uint32_t part;   // index of its DevicePart
  uint32_t first_token, tokens;  // of the block, counted in the part
  uint32_t row;                  // whose digest this is
};

namespace xxh3 {

constexpr uint64_t kPrime32_1 = 0x9E3779B1u, kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du,
                   kPrime64_1 = 0x9E3779B185EBCA87u, kPrime64_2 = 0xC2B2AE3D27D4EB4Fu,
                   kPrime64_3 = 0x165667B19E3779F9u, kPrime64_4 = 0x85EBCA77C2B2AE63u,
                   kPrime64_5 = 0x27D4EB2F165667C5u, kPrimeMx1 = 0x165667919E3779F9u,
                   kPrimeMx2 = 0x9FB21C651E98DF25u;

// The default secret, as words at multiples of 8 bytes.
#ifdef __CUDACC__
__constant__
#else
static
#endif
    const uint64_t secret_words[24] = {
        0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u,
        0x78e5c0cc4ee679cbu, 0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u,
        0xcb00c391bb52283cu, 0xa32e531b8b65d088u, 0x4ef90da297486471u, 0xd8acdea946ef1938u,
        0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au, 0x647378d9c97e9fc8u,
        0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
        0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu};

KVZIP_DEVICE uint64_t secret_at(unsigned byte) {
  const uint64_t low = secret_words[byte / 8] >> 8 * (byte % 8);
  return byte % 8 ? low | secret_words[byte / 8 + 1] << (64 - 8 * (byte % 8)) : low;
}

KVZIP_DEVICE uint64_t shuffle_xor64(uint64_t v, unsigned lane) {
  return uint64_t(shuffle_xor(unsigned(v >> 32), lane)) << 32 | shuffle_xor(unsigned(v), lane);
}

KVZIP_DEVICE uint64_t shuffle64(uint64_t v, unsigned lane) {
  return uint64_t(shuffle(unsigned(v >> 32), lane)) << 32 | shuffle(unsigned(v), lane);
}

KVZIP_DEVICE uint64_t high_product64(uint64_t a, uint64_t b) {
  const uint64_t al = uint32_t(a), ah = a >> 32, bl = uint32_t(b), bh = b >> 32;
  const uint64_t cross = (al * bl >> 32) + uint32_t(ah * bl) + al * bh;
  return (ah * bl >> 32) + (cross >> 32) + ah * bh;
}
KVZIP_DEVICE uint64_t folded(uint64_t a, uint64_t b) { return a * b ^ high_product64(a, b); }

// A block's bytes in order.
class BlockBytes {
 public:
  KVZIP_DEVICE BlockBytes(const DevicePart& part, const DigestJob& job, unsigned itemsize)
      : part_(part),
        first_(job.first_token),
        tokens_(job.tokens),
        itemsize_(itemsize),
        row_(part.dim * itemsize) {
    const uint64_t all = part.numbers | row_ | uint64_t(part.batch_stride * itemsize) |
                         uint64_t(part.head_stride * itemsize) |
                         uint64_t(part.token_stride * itemsize) |
                         (part.pages ? uint64_t(part.page_stride * itemsize) : 0);
    aligned_ = all % 8 == 0;
  }
  // Whether 256 bytes from a multiple of 256 on lie side by side.
  KVZIP_DEVICE bool in_lines() const { return aligned_ && row_ % 256 == 0; }
  // Eight of them, from any on.
  KVZIP_DEVICE uint64_t word(uint64_t at) const {
    if (aligned_ && at % 8 == 0) return *reinterpret_cast<const uint64_t*>(address(at));
    uint64_t v = 0;
    for (unsigned i = 0; i < 8; ++i) v |= uint64_t(byte(at + i)) << 8 * i;
    return v;
  }
  KVZIP_DEVICE uint8_t byte(uint64_t at) const {
    return *reinterpret_cast<const uint8_t*>(address(at));
  }

  KVZIP_DEVICE uint64_t address(uint64_t at) const {
    // Blocks are below 4 GiB in all but the largest, and short division is much faster.
    unsigned row, column;
    if (at >> 32) {
      row = unsigned(at / row_);
      column = unsigned(at % row_);
    } else {
      row = unsigned(at) / row_;
      column = unsigned(at) % row_;
    }
    const unsigned token = row % tokens_, rest = row / tokens_;
    const unsigned head = rest % part_.heads, batch = rest / part_.heads;
    const int64_t number = int64_t(batch) * part_.batch_stride + int64_t(head) * part_.head_stride +
                           place_of(part_, first_ + token);
    return part_.numbers + uint64_t(number * int64_t(itemsize_)) + column;
  }

 private:
  const DevicePart& part_;
  unsigned first_, tokens_, itemsize_, row_;
  bool aligned_;
};

// Little-endian, at any address.
template <typename U>
KVZIP_DEVICE U load(const unsigned char* p) {
  U v = 0;
  for (unsigned i = 0; i < sizeof(U); ++i) v |= U(p[i]) << 8 * i;
  return v;
}
KVZIP_DEVICE uint64_t rotated(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
KVZIP_DEVICE uint64_t avalanche(uint64_t h) {
  h = (h ^ h >> 37) * kPrimeMx1;
  return h ^ h >> 32;
}
KVZIP_DEVICE uint64_t avalanche_xxh64(uint64_t h) {
  h = (h ^ h >> 33) * kPrime64_2;
  h = (h ^ h >> 29) * kPrime64_3;
  return h ^ h >> 32;
}
KVZIP_DEVICE uint64_t swapped(uint64_t x) {
  uint64_t v = 0;
  for (int i = 0; i < 8; ++i) v = v << 8 | (x >> 8 * i & 0xFF);
  return v;
}

// Of up to 240 bytes, which lie at `p` side by side.
KVZIP_DEVICE uint64_t digest_short(const unsigned char* p, unsigned n) {
  const auto of = [&](unsigned at) { return secret_at(at); };
  const auto of32 = [&](unsigned at) { return uint64_t(uint32_t(secret_at(at))); };
  const auto mixed = [&](const unsigned char* q, unsigned at) {
    return folded(load<uint64_t>(q) ^ of(at), load<uint64_t>(q + 8) ^ of(at + 8));
  };
  if (n == 0) return avalanche_xxh64(of(56) ^ of(64));
  if (n <= 3) {
    const uint32_t combined = uint32_t(p[0]) << 16 | uint32_t(p[n >> 1]) << 24 | p[n - 1] | n << 8;
    return avalanche_xxh64(combined ^ (of32(0) ^ of32(4)));
  }
  if (n <= 8) {
    uint64_t h = load<uint32_t>(p + n - 4) + (uint64_t(load<uint32_t>(p)) << 32);
    h ^= of(8) ^ of(16);
    h ^= rotated(h, 49) ^ rotated(h, 24);
    h *= kPrimeMx2;
    h ^= (h >> 35) + n;
    h *= kPrimeMx2;
    return h ^ h >> 28;
  }
  if (n <= 16) {
    const uint64_t low = load<uint64_t>(p) ^ (of(24) ^ of(32));
    const uint64_t high = load<uint64_t>(p + n - 8) ^ (of(40) ^ of(48));
    return avalanche(n + swapped(low) + high + folded(low, high));
  }
  uint64_t h = n * kPrime64_1;
  if (n <= 128) {
    for (unsigned i = (n - 1) / 32 + 1; i-- > 0;)
      h += mixed(p + 16 * i, 32 * i) + mixed(p + n - 16 * (i + 1), 32 * i + 16);
    return avalanche(h);
  }
  for (unsigned i = 0; i < 8; ++i) h += mixed(p + 16 * i, 16 * i);
  h = avalanche(h);
  for (unsigned i = 8; i < n / 16; ++i) h += mixed(p + 16 * i, 16 * (i - 8) + 3);
  return avalanche(h + mixed(p + n - 16, 136 - 17));
}

}  // namespace xxh3

// Digests of blocks of up to 240 bytes, a block of threads each: uint64 [rows].
KVZIP_KERNEL(kDigestThreads, 1)
xxh3_short(const DigestJob* jobs, uint32_t count, const DevicePart* parts, uint32_t itemsize,
           uint64_t* digests) {
  if (block() >= count || thread()) return;
  const DigestJob job = jobs[block()];
  const DevicePart part = parts[job.part];
  const xxh3::BlockBytes bytes(part, job, itemsize);
  unsigned char all[240];
  const unsigned size = job.bytes < sizeof all ? unsigned(job.bytes) : unsigned(sizeof all);
  for (unsigned i = 0; i < size; ++i) all[i] = bytes.byte(i);
  digests[job.row] = xxh3::digest_short(all, size);
}

// Sums of pieces; `blocks_of_job` blocks of kSumsThreads share the pieces of one job.
KVZIP_KERNEL(kSumsThreads, 8)
xxh3_sums(const DigestJob* jobs, uint32_t count, uint32_t blocks_of_job, const DevicePart* parts,
          uint32_t itemsize) {
  const unsigned index = block() / blocks_of_job, share = block() % blocks_of_job;
  if (index >= count) return;
  const DigestJob job = jobs[index];
  const DevicePart part = parts[job.part];
  const xxh3::BlockBytes bytes(part, job, itemsize);
  const bool lines = bytes.in_lines();
  const unsigned warps = threads_of_block() / kWarp, lane = thread() % kWarp;
  const uint64_t pieces = (job.bytes + kPieceBytes - 1) / kPieceBytes;
  const uint64_t whole = (job.bytes - 1) / kPieceBytes;
  uint64_t* const sums = reinterpret_cast<uint64_t*>(job.sums);
  // Lane 8 s + w adds word w of stripes s, s + 4, s + 8 and s + 12.
  const unsigned w = lane % 8;
  for (uint64_t piece = share * warps + thread() / kWarp; piece < pieces;
       piece += uint64_t(blocks_of_job) * warps) {
    const unsigned stripes = piece < whole ? kPieceBytes / kStripeBytes
                                           : unsigned((job.bytes - 1) % kPieceBytes / kStripeBytes);
    uint64_t product = 0, plain = 0, line = 0;
    if (lines) {  // a lane finds each of the four
      const uint64_t at = piece * kPieceBytes + lane % 4 * 256;
      if (at < job.bytes) line = bytes.address(at);
    }
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned stripe = 4 * i + lane / 8;
      const uint64_t found = lines ? xxh3::shuffle64(line, i) : 0;
      if (stripe >= stripes) continue;
      const uint64_t value = lines
                                 ? *reinterpret_cast<const uint64_t*>(found + 8 * lane)
                                 : bytes.word(piece * kPieceBytes + stripe * kStripeBytes + 8 * w);
      const uint64_t key = value ^ xxh3::secret_words[stripe + w];
      product += uint64_t(uint32_t(key)) * (key >> 32);
      plain += value;
    }
    uint64_t sum = product + xxh3::shuffle_xor64(plain, 1);
    sum += xxh3::shuffle_xor64(sum, 8);
    sum += xxh3::shuffle_xor64(sum, 16);
    if (lane < 8) sums[piece * 8 + lane] = sum;
  }
}

// Digests of four jobs a warp: uint64 [rows].
KVZIP_KERNEL(kDigestThreads, 16)
xxh3_digests(const DigestJob* jobs, uint32_t count, const DevicePart* parts, uint32_t itemsize,
             uint64_t* digests) {
  using namespace xxh3;
  const unsigned lane = thread() % kWarp, w = lane % 8;
  const unsigned index = block() * 4 + lane / 8;
  // Lanes that have no job of their own take part in another's meetings.
  const DigestJob job = jobs[index < count ? index : count - 1];
  const DevicePart part = parts[job.part];
  const uint64_t initial[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                               kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  uint64_t acc = initial[w];
  const uint64_t pieces = (job.bytes + kPieceBytes - 1) / kPieceBytes;
  const uint64_t whole = (job.bytes - 1) / kPieceBytes;
  const uint64_t* const sums = reinterpret_cast<const uint64_t*>(job.sums) + w;
  const uint64_t scramble = secret_words[16 + w];
  uint64_t at = 0;
  for (; at + 8 <= whole; at += 8) {
    uint64_t next[8];
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) next[i] = sums[(at + i) * 8];
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
      acc += next[i];
      acc = (acc ^ acc >> 47 ^ scramble) * kPrime32_1;
    }
  }
  for (; at < whole; ++at) {
    acc += sums[at * 8];
    acc = (acc ^ acc >> 47 ^ scramble) * kPrime32_1;
  }
  if (pieces > whole) acc += sums[whole * 8];
  // The last 64 bytes once more.
  const BlockBytes bytes(part, job, itemsize);
  const uint64_t value = bytes.word(job.bytes - kStripeBytes + 8 * w);
  const uint64_t key = value ^ secret_at(192 - 64 - 7 + 8 * w);
  acc += uint64_t(uint32_t(key)) * (key >> 32) + shuffle_xor64(value, 1);
  const uint64_t mine = acc ^ secret_at(11 + 8 * w);
  const uint64_t other = shuffle_xor64(mine, 1);
  uint64_t sum = w % 2 ? 0 : folded(mine, other);
  sum += shuffle_xor64(sum, 2);
  sum += shuffle_xor64(sum, 4);
  uint64_t digest = job.bytes * kPrime64_1 + sum;
  digest = (digest ^ digest >> 37) * kPrimeMx1;
  digest ^= digest >> 32;
  if (w == 0 && index < count) digests[job.row] = digest;
}

}  // namespace kvzip::cuda
