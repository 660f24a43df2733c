#include "native/xxh3.hpp"

#include <cstring>

#include "native/simd.hpp"
#ifdef KVZIP_X86
#include <immintrin.h>
#endif

namespace kvzip {
namespace {

constexpr std::size_t kStripe = 64, kStripes = 16;  // of a block
constexpr std::uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D,
                        kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F,
                        kPrime64_3 = 0x165667B19E3779F9, kPrimeMx1 = 0x165667919E3779F9,
                        kPrimeMx2 = 0x9FB21C651E98DF25;

alignas(64) constexpr std::uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

template <typename U>
inline U load(const std::uint8_t* p) {
  U v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline std::uint64_t secret64(std::size_t at) { return load<std::uint64_t>(kSecret + at); }
inline std::uint64_t secret32(std::size_t at) { return load<std::uint32_t>(kSecret + at); }

inline std::uint64_t folded(std::uint64_t a, std::uint64_t b) {
  __extension__ typedef unsigned __int128 Wide;
  const Wide product = Wide(a) * b;
  return std::uint64_t(product) ^ std::uint64_t(product >> 64);
}
inline std::uint64_t rotated(std::uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
inline std::uint64_t avalanche(std::uint64_t h) {
  h = (h ^ h >> 37) * kPrimeMx1;
  return h ^ h >> 32;
}
inline std::uint64_t avalanche_xxh64(std::uint64_t h) {
  h = (h ^ h >> 33) * kPrime64_2;
  h = (h ^ h >> 29) * kPrime64_3;
  return h ^ h >> 32;
}
inline std::uint64_t mixed(const std::uint8_t* p, std::size_t secret) {
  return folded(load<std::uint64_t>(p) ^ secret64(secret),
                load<std::uint64_t>(p + 8) ^ secret64(secret + 8));
}

// --- up to 240 bytes ---------------------------------------------------------------------------

std::uint64_t hash_short(const std::uint8_t* p, std::size_t n) {
  if (n == 0) return avalanche_xxh64(secret64(56) ^ secret64(64));
  if (n <= 3) {
    const std::uint32_t combined = std::uint32_t(p[0]) << 16 | std::uint32_t(p[n >> 1]) << 24 |
                                   p[n - 1] | std::uint32_t(n) << 8;
    return avalanche_xxh64(combined ^ (secret32(0) ^ secret32(4)));
  }
  if (n <= 8) {
    const std::uint64_t value =
        load<std::uint32_t>(p + n - 4) + (std::uint64_t(load<std::uint32_t>(p)) << 32);
    std::uint64_t h = value ^ (secret64(8) ^ secret64(16));
    h ^= rotated(h, 49) ^ rotated(h, 24);
    h *= kPrimeMx2;
    h ^= (h >> 35) + n;
    h *= kPrimeMx2;
    return h ^ h >> 28;
  }
  if (n <= 16) {
    const std::uint64_t low = load<std::uint64_t>(p) ^ (secret64(24) ^ secret64(32));
    const std::uint64_t high = load<std::uint64_t>(p + n - 8) ^ (secret64(40) ^ secret64(48));
    return avalanche(n + __builtin_bswap64(low) + high + folded(low, high));
  }
  std::uint64_t h = n * kPrime64_1;
  if (n <= 128) {
    for (std::size_t i = (n - 1) / 32 + 1; i-- > 0;)
      h += mixed(p + 16 * i, 32 * i) + mixed(p + n - 16 * (i + 1), 32 * i + 16);
    return avalanche(h);
  }
  for (std::size_t i = 0; i < 8; ++i) h += mixed(p + 16 * i, 16 * i);
  h = avalanche(h);
  for (std::size_t i = 8; i < n / 16; ++i) h += mixed(p + 16 * i, 16 * (i - 8) + 3);
  return avalanche(h + mixed(p + n - 16, 136 - 17));
}

// --- more: stripes of 64 bytes -----------------------------------------------------------------

void add_stripe(std::uint64_t* sums, const std::uint8_t* data, const std::uint8_t* secret) {
#ifdef KVZIP_X86  // all of which have these; compilers do not find them
  const auto at = [](const void* p) { return static_cast<const __m128i*>(p); };
  for (std::size_t i = 0; i < 8; i += 2) {
    const __m128i value = _mm_loadu_si128(at(data + 8 * i));
    const __m128i key = _mm_xor_si128(value, _mm_loadu_si128(at(secret + 8 * i)));
    __m128i sum = _mm_loadu_si128(at(sums + i));
    sum = _mm_add_epi64(sum, _mm_shuffle_epi32(value, 0x4E));
    sum = _mm_add_epi64(sum, _mm_mul_epu32(key, _mm_srli_epi64(key, 32)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i), sum);
  }
#else
  for (std::size_t i = 0; i < 8; ++i) {
    const std::uint64_t value = load<std::uint64_t>(data + 8 * i);
    const std::uint64_t key = value ^ load<std::uint64_t>(secret + 8 * i);
    sums[i ^ 1] += value;
    sums[i] += std::uint64_t(std::uint32_t(key)) * (key >> 32);
  }
#endif
}

void add_blocks(std::uint64_t* sums, const std::uint8_t* data, std::size_t blocks) {
  for (; blocks; --blocks) {
    for (std::size_t s = 0; s < kStripes; ++s, data += kStripe)
      add_stripe(sums, data, kSecret + 8 * s);
    for (std::size_t i = 0; i < 8; ++i)
      sums[i] = (sums[i] ^ sums[i] >> 47 ^ secret64(128 + 8 * i)) * kPrime32_1;
  }
}

#ifdef KVZIP_X86
__attribute__((target("avx2"))) void add_blocks_avx2(std::uint64_t* sums, const std::uint8_t* data,
                                                     std::size_t blocks) {
  const auto at = [](const void* p) { return static_cast<const __m256i*>(p); };
  __m256i a[2] = {_mm256_loadu_si256(at(sums)), _mm256_loadu_si256(at(sums + 4))};
  const __m256i prime = _mm256_set1_epi64x(std::int64_t(kPrime32_1));
  for (; blocks; --blocks) {
    for (std::size_t s = 0; s < kStripes; ++s, data += kStripe)
      for (int i = 0; i < 2; ++i) {
        const __m256i value = _mm256_loadu_si256(at(data + 32 * i));
        const __m256i key =
            _mm256_xor_si256(value, _mm256_loadu_si256(at(kSecret + 8 * s + 32 * std::size_t(i))));
        a[i] = _mm256_add_epi64(a[i], _mm256_shuffle_epi32(value, 0x4E));
        a[i] = _mm256_add_epi64(a[i], _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32)));
      }
    for (int i = 0; i < 2; ++i) {
      __m256i key = _mm256_xor_si256(a[i], _mm256_srli_epi64(a[i], 47));
      key = _mm256_xor_si256(key, _mm256_loadu_si256(at(kSecret + 128 + 32 * i)));
      a[i] = _mm256_add_epi64(
          _mm256_mul_epu32(key, prime),
          _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(key, 32), prime), 32));
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), a[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 4), a[1]);
}

__attribute__((target("avx512f"))) void add_blocks_avx512(std::uint64_t* sums,
                                                          const std::uint8_t* data,
                                                          std::size_t blocks) {
  __m512i a = _mm512_loadu_si512(sums);
  const __m512i prime = _mm512_set1_epi64(std::int64_t(kPrime32_1));
  for (; blocks; --blocks) {
#pragma GCC unroll 16
    for (std::size_t s = 0; s < kStripes; ++s, data += kStripe) {
      const __m512i value = _mm512_loadu_si512(data);
      const __m512i key = _mm512_xor_si512(value, _mm512_loadu_si512(kSecret + 8 * s));
      a = _mm512_add_epi64(a, _mm512_shuffle_epi32(value, _MM_PERM_ENUM(0x4E)));
      a = _mm512_add_epi64(a, _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32)));
    }
    __m512i key = _mm512_xor_si512(a, _mm512_srli_epi64(a, 47));
    key = _mm512_xor_si512(key, _mm512_loadu_si512(kSecret + 128));
    a = _mm512_add_epi64(
        _mm512_mul_epu32(key, prime),
        _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(key, 32), prime), 32));
  }
  _mm512_storeu_si512(sums, a);
}
#endif

auto blocks_adder() {
  switch (simd::vectors()) {
#ifdef KVZIP_X86
    case simd::Level::avx512: return add_blocks_avx512;
    case simd::Level::avx2: return add_blocks_avx2;
#endif
    default: return add_blocks;
  }
}

}  // namespace

void Xxh3::update(const void* data, std::size_t size) {
  const auto* p = static_cast<const std::uint8_t*>(data);
  std::uint8_t* const block = room_ + kStripe;
  total_ += size;
  if (waiting_ + size <= kBlock) {
    if (size) std::memcpy(block + waiting_, p, size);
    waiting_ += size;
    return;
  }
  // At least a byte waits behind every block that is taken up.
  const auto add = blocks_adder();
  if (waiting_) {
    const std::size_t missing = kBlock - waiting_;
    std::memcpy(block + waiting_, p, missing);
    add(sums_, block, 1);
    std::memcpy(room_, block + kBlock - kStripe, kStripe);
    p += missing;
    size -= missing;
  }
  if (const std::size_t blocks = (size - 1) / kBlock) {
    add(sums_, p, blocks);
    p += blocks * kBlock;
    size -= blocks * kBlock;
    std::memcpy(room_, p - kStripe, kStripe);
  }
  std::memcpy(block, p, size);
  waiting_ = size;
}

std::uint64_t Xxh3::digest() const {
  const std::uint8_t* const block = room_ + kStripe;
  if (total_ <= 240) return hash_short(block, std::size_t(total_));
  std::uint64_t sums[8];
  std::memcpy(sums, sums_, sizeof sums);
  for (std::size_t s = 0; s < (waiting_ - 1) / kStripe; ++s)
    add_stripe(sums, block + kStripe * s, kSecret + 8 * s);
  add_stripe(sums, block + waiting_ - kStripe, kSecret + 192 - kStripe - 7);
  std::uint64_t h = total_ * kPrime64_1;
  for (std::size_t i = 0; i < 8; i += 2)
    h += folded(sums[i] ^ secret64(11 + 8 * i), sums[i + 1] ^ secret64(11 + 8 * i + 8));
  return avalanche(h);
}

}  // namespace kvzip
