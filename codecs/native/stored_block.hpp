// A stored block as Python tells of it, and blocks whose numbers are stored as they are, which all
// codecs have alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace kvzip::cuda {

// BLOCK of cuda/work.py.
struct StoredBlock {
  std::uint64_t host, address, length;
  std::uint32_t part, first, tokens, row;

  const std::uint8_t* bytes() const { return reinterpret_cast<const std::uint8_t*>(host); }
};

// Before numbers that are stored as they are there are so many bytes, all of them zeros.
constexpr std::size_t kAsTheyAreHeader = 16;

// Throws std::invalid_argument unless a block that begins with a zero is so many bytes of numbers
// as they are.
inline void check_as_they_are(const StoredBlock& block, std::uint64_t bytes) {
  if (block.length < kAsTheyAreHeader || block.length - kAsTheyAreHeader != bytes)
    throw std::invalid_argument("numbers of another size");
  if (std::any_of(block.bytes(), block.bytes() + kAsTheyAreHeader,
                  [](std::uint8_t byte) { return byte != 0; }))
    throw std::invalid_argument("its padding is not zeros");
}

}  // namespace kvzip::cuda
