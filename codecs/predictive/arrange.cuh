// Regions of tokens, and tokens in tiles of one region (spec.md, "Prediction" and "Block").
#pragma once

#include "predictive/tiles.cuh"

namespace kvzip::predictive {

constexpr unsigned kRegionWarps = 4, kArrangeWarps = 8;

// The region of a token: the first of those whose score is greatest. A warp does a token.
KVZIP_DEVICE unsigned region_of(const RangeJob& job, const DeviceLayer& layer, unsigned token) {
  const unsigned lane = cuda::thread() % cuda::kWarp;
  const DeviceInput* const inputs = reinterpret_cast<const DeviceInput*>(layer.inputs);
  const auto* const row =
      reinterpret_cast<const unsigned char*>(job.inputs) + uint64_t(token) * layer.row_bytes;
  const auto* const centres = reinterpret_cast<const unsigned char*>(layer.centre);
  const auto* const biases = reinterpret_cast<const int32_t*>(layer.centre_bias);
  int best = 0;
  unsigned found = 0;
  for (unsigned r = 0; r < layer.regions; ++r) {
    const unsigned char* weights = centres + uint64_t(r) * layer.input_width;
    int score = 0;
    for (unsigned i = 0; i < layer.input_count; ++i) {
      const DeviceInput input = inputs[i];
      for (unsigned at = 4 * lane; at < input.width; at += 4 * cuda::kWarp)
        score = cuda::dot4(*reinterpret_cast<const unsigned*>(row + input.start + at),
                           *reinterpret_cast<const unsigned*>(weights + at), score);
      weights += input.width;
    }
    for (unsigned step = cuda::kWarp / 2; step; step /= 2)
      score += int(cuda::shuffle_xor(unsigned(score), step));
    score += biases[r];
    if (r == 0 || score > best) {
      best = score;
      found = r;
    }
  }
  return found;
}

// Of each token of a range its region. Blocks of threads do a job together, a warp a token after
// the other.
KVZIP_KERNEL(kRegionWarps* cuda::kWarp, 4)
predictive_regions(const RangeJob* jobs, uint32_t count, uint32_t blocks) {
  const unsigned number = cuda::block() / blocks;
  if (number >= count) return;
  const RangeJob& job = jobs[number];
  const DeviceLayer& layer = *reinterpret_cast<const DeviceLayer*>(job.layer);
  auto* const regions = reinterpret_cast<uint8_t*>(job.regions);
  const unsigned warp = cuda::block() % blocks * kRegionWarps + cuda::thread() / cuda::kWarp;
  for (unsigned token = warp; token < job.tokens; token += blocks * kRegionWarps) {
    const unsigned region = region_of(job, layer, token);
    if (cuda::thread() % cuda::kWarp == 0) regions[token] = uint8_t(region);
  }
}

// Tokens region after region, within one as they come, and the tiles that they are cut into. A
// block of threads does a job, a warp a region after the other.
KVZIP_KERNEL(kArrangeWarps* cuda::kWarp, 1)
predictive_arrange(const RangeJob* jobs, uint32_t count) {
  if (cuda::block() >= count) return;
  const RangeJob& job = jobs[cuda::block()];
  const DeviceLayer& layer = *reinterpret_cast<const DeviceLayer*>(job.layer);
  const auto* const regions = reinterpret_cast<const uint8_t*>(job.regions);
  auto* const at = reinterpret_cast<uint32_t*>(job.at);
  auto* const tiles = reinterpret_cast<DeviceTile*>(job.tiles + 16);
  unsigned* const counts = reinterpret_cast<unsigned*>(cuda::shared_memory());
  const unsigned lane = cuda::thread() % cuda::kWarp, warp = cuda::thread() / cuda::kWarp;
  const auto votes_for = [&](unsigned r, unsigned first) {
    return cuda::ballot(first + lane < job.tokens && regions[first + lane] == r);
  };
  for (unsigned r = warp; r < layer.regions; r += kArrangeWarps) {
    unsigned mine = 0;
    for (unsigned first = 0; first < job.tokens; first += cuda::kWarp)
      mine += cuda::ones(votes_for(r, first));
    if (lane == 0) counts[r] = mine;
  }
  cuda::sync_block();
  for (unsigned r = warp; r < layer.regions; r += kArrangeWarps) {
    unsigned start = 0, tile = 0;
    for (unsigned i = 0; i < r; ++i) {
      start += counts[i];
      tile += (counts[i] + kTileTokens - 1) / kTileTokens;
    }
    const unsigned mine = counts[r], own = (mine + kTileTokens - 1) / kTileTokens;
    for (unsigned i = lane; i < own; i += cuda::kWarp) {
      const unsigned left = mine - i * kTileTokens;
      tiles[tile + i] = {start + i * kTileTokens, left < kTileTokens ? left : kTileTokens, r, 0};
    }
    if (r + 1 == layer.regions && lane == 0) *reinterpret_cast<uint32_t*>(job.tiles) = tile + own;
    for (unsigned first = 0; first < job.tokens; first += cuda::kWarp) {
      const unsigned votes = votes_for(r, first);
      if (votes >> lane & 1) at[start + cuda::ones(votes & ((1u << lane) - 1))] = first + lane;
      start += cuda::ones(votes);
    }
  }
}

}  // namespace kvzip::predictive
