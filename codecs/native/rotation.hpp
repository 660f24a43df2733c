// Keys before and behind RoPE, bit for bit.
//
// RoPE (Su et al. 2021, arXiv 2104.09864) turns pairs of numbers of each head, i and i + `pairs` or
// 2 i and 2 i + 1, by an angle that grows with the position. A model that does so in bf16 rounds on
// the way, so what it caches can be had again from the bf16 numbers that it turned, and these are
// more alike from token to token. codecs/channel/spec.md has the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "native/rope_rounding.hpp"

namespace kvzip {

class Rotation {
 public:
  // Numbers of bf16, [heads, tokens, dim], rows of a batch and heads counted as one; strides in
  // numbers.
  template <typename T>
  struct Rows {
    T* data;
    std::size_t heads, tokens;
    std::ptrdiff_t head_stride, token_stride;
  };

  // `frequency`: radians a position, of each pair. Cosines and sines are multiplied by `scale`.
  Rotation(const float* frequency, std::size_t pairs, float scale);

  std::size_t pairs() const { return frequency_.size(); }

  // Where the two numbers of a pair stand in a head.
  struct Places {
    std::size_t first, second;
  };
  Places places_of(std::size_t pair, RopeRounding rounding) const;

  // Turns keys, of which the first token stands at the position `first`, where they are.
  void turn(const Rows<std::uint16_t>& keys, std::size_t first, RopeRounding rounding) const;

  // Finds numbers that turn to these bit for bit: writes them to `out`, and adds to `missing` the
  // pairs that have none, counted in the order of [heads, tokens, pairs]; these are written as they
  // are. Gives up, and returns false, when more than `most` are missing: `missing` then has some.
  bool unturn(const Rows<const std::uint16_t>& keys, std::size_t first, RopeRounding rounding,
              const Rows<std::uint16_t>& out, std::size_t most,
              std::vector<std::uint64_t>* missing) const;

  // Cosines, then sines, of all pairs, of positions that follow each other: [positions, 2, pairs],
  // in float32; in bf16 those of a rounding that is not wide.
  void angles_of(std::size_t first, std::size_t positions, float* out) const;
  void angles_of(std::size_t first, std::size_t positions, std::uint16_t* out) const;

 private:
  // Of so many positions that follow each other, as kernels read them.
  static constexpr std::size_t kPositions = 256;
  using Angles = std::shared_ptr<const std::vector<float>>;
  Angles angles_at(std::size_t block, RopeRounding rounding) const;
  // Calls use(angles, token, tokens) for one run of tokens after the other.
  template <typename Use>
  void each_run(std::size_t first, std::size_t tokens, RopeRounding rounding, const Use& use) const;
  template <typename T>
  void write_angles(std::size_t first, std::size_t positions, T* out) const;

  std::vector<float> frequency_;
  float scale_;
  mutable std::mutex mutex_;
  mutable std::unordered_map<std::size_t, Angles> known_;  // by block, and how it lies in memory
};

}  // namespace kvzip
