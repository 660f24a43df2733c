// How the encoder chooses its tables: channels that are distributed alike share one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvzip::channel {

// Tables of one layer's keys or values. A shape is a distribution over sign and exponent up to
// where its exponents begin and which sign is which; a channel is a shape and its `base`.
struct Shapes {
  std::vector<std::uint8_t> widths, escapes, levels;  // one, one and 2*width bytes a shape
  std::vector<std::uint16_t> shape, base;             // of each channel
  double bits = 0;                                    // that all values will take, about
};

// `counts`: of each channel 2 << exponent_bits, of which one at least is not 0.
Shapes choose_shapes(const std::vector<const std::uint32_t*>& counts, int exponent_bits);

}  // namespace kvzip::channel
