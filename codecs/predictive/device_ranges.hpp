// What the host keeps of a token range that goes through the layers on a GPU.
#pragma once

#include <cstdint>

namespace kvzip::predictive {

// As gpu.py has it.
struct DeviceRange {
  std::uint64_t position;  // of the first token
  // Where on the device what goes with the range is, as in RangeJob.
  std::uint64_t inputs, residual, products, energy, states, regions, at, tiles;
  std::uint64_t entries;       // likewise, of the work that is being made
  std::uint32_t rows, tokens;  // rows of the batch, and tokens of each
  std::uint32_t next_part;     // 2 layer + part, of the part that comes next
  std::uint32_t predicted;     // 0 when no more can be: a part did not follow the one before it
  std::uint32_t coded;         // whether there are states of rANS
  std::uint32_t reserved;
};

}  // namespace kvzip::predictive
