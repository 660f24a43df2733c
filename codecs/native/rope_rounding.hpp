// How a model that turns keys by RoPE rounds. codecs/channel/spec.md has the arithmetic.
#pragma once

#include <cstdint>

namespace kvzip {

// Its two products and their sum (`each`), or the sum alone (`once`); or the sum alone where its
// cosines and sines are not rounded to bf16 either (`wide`). And the same of a model whose pairs
// are 2 i and 2 i + 1, and not i and i + pairs. Stored in files.
enum class RopeRounding : std::uint8_t {
  none = 0,  // keys are coded as they are cached
  each = 1,
  once = 2,
  wide = 3,
  each_side_by_side = 4,
  once_side_by_side = 5,
  wide_side_by_side = 6
};
constexpr int kRopeRoundings = 6;

// Whether a number says how keys were turned.
constexpr bool is_rope_rounding(int value) { return value >= 1 && value <= kRopeRoundings; }
constexpr bool is_side_by_side(RopeRounding rounding) { return rounding > RopeRounding::wide; }
constexpr bool is_wide(RopeRounding rounding) {
  return rounding == RopeRounding::wide || rounding == RopeRounding::wide_side_by_side;
}
constexpr bool rounds_products(RopeRounding rounding) {
  return rounding == RopeRounding::each || rounding == RopeRounding::each_side_by_side;
}
// A rounding of pairs that are `pairs` apart, of a model whose pairs are side by side.
constexpr RopeRounding side_by_side(RopeRounding rounding) {
  switch (rounding) {
    case RopeRounding::each: return RopeRounding::each_side_by_side;
    case RopeRounding::once: return RopeRounding::once_side_by_side;
    case RopeRounding::wide: return RopeRounding::wide_side_by_side;
    default: return rounding;
  }
}

}  // namespace kvzip
