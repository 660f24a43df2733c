// What the fuzzers of this folder share: random numbers, the instruction sets of this processor, a
// digest of what was encoded, and the rounds. Built with AddressSanitizer and UBSan, and for other
// processors, by test_fuzzers.py.
//   fuzz SECONDS SEED        rounds until it has taken so much of the processor's time, at least 3
//   fuzz --rounds N SEED     so many, and the digest
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <vector>

#include "native/simd.hpp"
#include "native/xxh3.hpp"

namespace kvzip::fuzz {

using Bytes = std::vector<std::uint8_t>;

inline std::mt19937_64 random_bits;
inline std::size_t below(std::size_t n) { return random_bits() % n; }

inline Xxh3 encoded_bytes;

inline void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  std::exit(1);
}

// Those for products of bytes alone are of use to who says so before this header.
#ifdef KVZIP_FUZZ_PRODUCTS
constexpr bool kOfBytes = true;
#else
constexpr bool kOfBytes = false;
#endif
inline std::vector<simd::Level> levels() {
  std::vector<simd::Level> found;
  for (int i = 0; i < simd::kLevels; ++i)
    if (simd::set_level(simd::Level(i)) && (kOfBytes || simd::vectors() == simd::level()))
      found.push_back(simd::Level(i));
  return found;
}
inline const std::vector<simd::Level> kLevels = levels();

// Memory on the heap and of the exact size, so that a byte too far is seen; a vector's capacity may
// be more than its size.
struct Exact {
  explicit Exact(const Bytes& bytes) : data(new std::uint8_t[bytes.size()]), size(bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), data.get());
  }
  std::unique_ptr<std::uint8_t[]> data;
  std::size_t size;
};

constexpr int kLeast = 3;

template <typename Round>
int run(int argc, char** argv, Round round) {
  const bool counted = argc > 2 && !std::strcmp(argv[1], "--rounds");
  const double limit = argc > 1 + counted ? std::atof(argv[1 + counted]) : 2;
  random_bits.seed(argc > 2 + counted ? std::strtoull(argv[2 + counted], nullptr, 10) : 1);
  const auto spent = [] { return double(std::clock()) / CLOCKS_PER_SEC; };
  int rounds = 0;
  for (; counted ? rounds < limit : rounds < kLeast || spent() < limit; ++rounds) round();
  std::printf("%d rounds, paths:", rounds);
  for (simd::Level level : kLevels) std::printf(" %s", simd::name_of(level));
  std::printf("\n");
  if (counted) std::printf("%016llx\n", static_cast<unsigned long long>(encoded_bytes.digest()));
  return 0;
}

}  // namespace kvzip::fuzz
