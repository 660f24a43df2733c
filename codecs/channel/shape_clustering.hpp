// How the encoder chooses its tables: channels that are distributed alike share one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvzip::channel {

// Shapes one after the other. A shape is a distribution over sign and exponent up to where its
// exponents begin and which sign is which.
struct ShapeLevels {
  std::vector<std::uint8_t> widths, escapes, levels;  // width - 1, one and 2*width bytes a shape

  std::size_t count() const { return widths.size(); }
  // Calls with each shape's number, levels, width and escape level.
  template <typename Use>
  void each(const Use& use) const {
    const std::uint8_t* at = levels.data();
    for (std::size_t i = 0; i < count(); ++i) {
      const std::size_t width = std::size_t(widths[i]) + 1;
      use(i, at, width, escapes[i]);
      at += 2 * width;
    }
  }
};

// Tables of one layer's keys or values: a channel is a shape and its `base`.
struct Shapes {
  ShapeLevels levels;
  std::vector<std::uint16_t> shape, base;  // of each channel
  double bits = 0;                         // that all values will take, about
};

// `counts`: of each channel 2 << exponent_bits; of its `numbers`, at least one, all are counted.
// `any_value`: whether every shape has an escape, for numbers that are not among these.
Shapes choose_shapes(const std::vector<const std::uint32_t*>& counts, std::uint64_t numbers,
                     int exponent_bits, bool any_value = false);

}  // namespace kvzip::channel
