// What other layers say of each channel: products of a layer's inputs and its weights, on the
// tensor cores. Sums are exact: 65,536 products of 7 bits fit 31.
#pragma once

#include "predictive/tiles.cuh"

namespace kvzip::predictive {

constexpr unsigned kProductWarps = 4;     // of a block; each does a tile
constexpr unsigned kProductColumns = 64;  // of a block
constexpr unsigned kProductInputs = 64;   // of a step: two products of matrices

// The weights of a region lie as threads take them: for 16 columns and a step of 64 inputs twice 16
// bytes a thread, the operand `a` of multiply_add. Thread (g, q) holds inputs 16 q + 8 i ... of the
// step's half i, the same ones that it loads of a token's row as 16 bytes.
template <typename V>
KVZIP_DEVICE const V* weights_of(const DeviceLayer& layer, unsigned region, unsigned column) {
  const uint64_t steps = layer.input_width / kProductInputs;
  const uint64_t number = (uint64_t(region) * (layer.columns / 16) + column / 16) * steps;
  return reinterpret_cast<const V*>(layer.weight) + number * (2 * cuda::kWarp);
}

KVZIP_DEVICE void multiply_tile(const RangeJob& job, const DeviceLayer& layer, unsigned number,
                                unsigned column) {
  constexpr unsigned kRows = kProductColumns / 16, kTokens = kTileTokens / 8;
  const unsigned lane = cuda::thread() % cuda::kWarp, g = lane / 4, q = lane % 4;
  const DeviceTile tile = tile_of(job, number);
  const DeviceInput* const inputs = reinterpret_cast<const DeviceInput*>(layer.inputs);
  const unsigned char* rows[kTokens];
#pragma unroll
  for (unsigned t = 0; t < kTokens; ++t)
    rows[t] = reinterpret_cast<const unsigned char*>(job.inputs) +
              uint64_t(token_of(job, tile, 8 * t + g)) * layer.row_bytes + 16 * q;
  const cuda::Four* const weights = weights_of<cuda::Four>(layer, tile.region, column) + lane;
  const unsigned apart = layer.input_width / kProductInputs * 2 * cuda::kWarp;
  int sums[kRows][kTokens][4] = {};
  unsigned step = 0;
  for (unsigned i = 0; i < layer.input_count; ++i) {
    const DeviceInput input = inputs[i];
#pragma unroll 1
    for (unsigned at = 0; at < input.width; at += kProductInputs, ++step) {
      cuda::Four x[kTokens];
#pragma unroll
      for (unsigned t = 0; t < kTokens; ++t)
        x[t] = *reinterpret_cast<const cuda::Four*>(rows[t] + input.start + at);
#pragma unroll
      for (unsigned half = 0; half < 2; ++half)
#pragma unroll
        for (unsigned r = 0; r < kRows; ++r) {
          const cuda::Four w =
              cuda::constant(weights + r * apart + (2 * step + half) * cuda::kWarp);
#pragma unroll
          for (unsigned t = 0; t < kTokens; ++t)
            cuda::multiply_add(sums[r][t], w.v, x[t].v[2 * half], x[t].v[2 * half + 1]);
        }
    }
  }
  int* const to = reinterpret_cast<int*>(job.products) +
                  (uint64_t(number) * layer.columns + column + g) * kTileTokens + 2 * q;
#pragma unroll
  for (unsigned r = 0; r < kRows; ++r)
#pragma unroll
    for (unsigned t = 0; t < kTokens; ++t)
#pragma unroll
      for (unsigned high = 0; high < 2; ++high)
        *reinterpret_cast<cuda::Two*>(to + (16 * r + 8 * high) * kTileTokens + 8 * t) = {
            {unsigned(sums[r][t][2 * high]), unsigned(sums[r][t][2 * high + 1])}};
}

// All columns of all tiles of a job, by `blocks` blocks of threads: four tiles and 64 columns each.
KVZIP_KERNEL(kProductWarps* cuda::kWarp, 3)
predictive_products(const RangeJob* jobs, uint32_t count, uint32_t blocks) {
  const unsigned number = cuda::block() / blocks;
  if (number >= count) return;
  const RangeJob& job = jobs[number];
  const DeviceLayer& layer = *reinterpret_cast<const DeviceLayer*>(job.layer);
  const unsigned across = layer.columns / kProductColumns, mine = cuda::block() % blocks;
  const unsigned tile = mine / across * kProductWarps + cuda::thread() / cuda::kWarp;
  if (tile < tile_count(job)) multiply_tile(job, layer, tile, mine % across * kProductColumns);
}

}  // namespace kvzip::predictive
