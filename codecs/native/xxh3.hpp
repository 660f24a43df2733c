// XXH3-64 (seed 0, the default secret), after its specification:
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
// Written anew, so that kernels can check what they have decoded while it is in the caches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip {

class Xxh3 {
 public:
  void update(const void* data, std::size_t size);
  std::uint64_t digest() const;

 private:
  static constexpr std::size_t kStripe = 64, kBlock = 1024;

  std::uint64_t total_ = 0;
  std::size_t waiting_ = 0;
  alignas(64) std::uint64_t sums_[8] = {0xC2B2AE3D,         0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F,
                                        0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x85EBCA77,
                                        0x27D4EB2F165667C5, 0x9E3779B1};
  // The last stripe that was taken up, then up to a block that waits: the end is special.
  alignas(64) std::uint8_t room_[kStripe + kBlock];
};

}  // namespace kvzip
