// Tokens in tiles of one region, as predictive_arrange (arrange.cuh) has cut them.
#pragma once

#include "native/cuda/int8.cuh"
#include "predictive/device_jobs.hpp"

namespace kvzip::predictive {

constexpr unsigned kTileTokens = 32;

// How many tiles there are.
KVZIP_DEVICE unsigned tile_count(const RangeJob& job) {
  return job.at ? *reinterpret_cast<const uint32_t*>(job.tiles)
                : (job.tokens + kTileTokens - 1) / kTileTokens;
}
KVZIP_DEVICE DeviceTile tile_of(const RangeJob& job, unsigned number) {
  if (job.at) return reinterpret_cast<const DeviceTile*>(job.tiles + 16)[number];
  const unsigned start = number * kTileTokens, left = job.tokens - start;
  return {start, left < kTileTokens ? left : kTileTokens, 0, 0};
}
// A tile's token of that number; behind the last it is that.
KVZIP_DEVICE unsigned token_of(const RangeJob& job, const DeviceTile& tile, unsigned number) {
  const unsigned place = tile.start + (number < tile.count ? number : tile.count - 1);
  return job.at ? reinterpret_cast<const uint32_t*>(job.at)[place] : place;
}

}  // namespace kvzip::predictive
