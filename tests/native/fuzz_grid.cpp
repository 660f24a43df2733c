// Grids: widening on every instruction set against one number at a time, and the search for scales
// in numbers that are on a grid, nearly, or on none.
#include "fuzz.hpp"

#include "native/grid_round.hpp"

using namespace kvzip::grid;
using namespace kvzip::fuzz;
namespace simd = kvzip::simd;

namespace {

const char* const kNarrowNames[] = {"fp4_e2m1",   "int4",         "fp8_e5m2", "fp8_e5m2fnuz",
                                    "fp8_e4m3fn", "fp8_e4m3fnuz", "int8"};

// Memory on the heap and of the exact size, so that a number too far is seen.
template <typename T>
std::unique_ptr<T[]> room(std::size_t n) {
  return std::unique_ptr<T[]>(new T[n]());
}

std::vector<Scale> some_scales(std::size_t n) {
  const int reach = below(3) ? 20 : 126;
  const bool power = below(3) == 0;
  std::vector<Scale> scales(n);
  for (Scale& scale : scales) {
    const std::uint32_t exponent = std::uint32_t(127 - reach + int(below(2 * reach + 1)));
    const std::uint32_t fraction = power ? 0 : std::uint32_t(below(1u << 23));
    check(read(ScaleFormat::fp32, exponent << 23 | fraction, scale), "a scale that is refused");
  }
  return scales;
}

template <typename T>
void grids(const Wide& wide) {
  const Narrow& narrow = *find_narrow(kNarrowNames[below(7)]);
  const Rounding rounding = below(2) ? Rounding::once : Rounding::through_fp32;
  Shape shape{1 + below(3), 1 + below(40), 1 + below(below(4) ? 80 : 600), 1, 1};
  (below(2) ? shape.group_tokens : shape.group_channels) = 1 + below(100);
  if (below(8) == 0) shape.group_tokens = shape.group_channels = std::size_t(1) << 40;
  const std::size_t first = below(70);
  const std::size_t scale_rows = (first + shape.tokens - 1) / shape.group_tokens + 1;
  const std::size_t n = shape.rows * shape.tokens * shape.channels;
  const std::vector<Scale> scales = some_scales(shape.rows * scale_rows * shape.scale_columns());
  const auto codes = room<std::uint8_t>(n);
  const std::size_t kinds = below(3) ? 256 : 1 + below(5);
  for (std::size_t i = 0; i < n; ++i)
    codes[i] = std::uint8_t(below(kinds) & ((2u << narrow.sign) - 1));

  const auto numbers = room<T>(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t channel = i % shape.channels, line = i / shape.channels;
    const std::size_t token = line % shape.tokens, row = line / shape.tokens;
    const std::size_t group = row * scale_rows + (first + token) / shape.group_tokens;
    Scale scale = scales[group * shape.scale_columns() + channel / shape.group_channels];
    scale.exponent -= narrow.step;
    numbers[i] = T(widen_one(wide, narrow, rounding, codes[i], scale));
  }
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    const auto widened = room<T>(n);
    widen(wide, narrow, rounding, shape, codes.get(), scales.data(), scale_rows, first,
          widened.get(), std::ptrdiff_t(shape.tokens * shape.channels),
          std::ptrdiff_t(shape.channels));
    check(!std::memcmp(widened.get(), numbers.get(), n * sizeof(T)), "widened to other numbers");
  }

  const std::size_t damage = below(3) ? below(20) : n;
  for (std::size_t i = 0; i < damage; ++i) numbers[below(n)] = T(random_bits());
  const auto found_codes = room<std::uint8_t>(n);
  const auto found_scales =
      room<std::uint32_t>(shape.rows * shape.scale_rows() * shape.scale_columns());
  fit(wide, narrow, rounding, shape, numbers.get(), found_codes.get(), found_scales.get());
  encoded_bytes.update(found_codes.get(), n);
  for (std::size_t i = 0; i < shape.rows * shape.scale_rows() * shape.scale_columns(); ++i) {
    Scale scale;
    check(read(ScaleFormat::fp32, found_scales[i], scale), "a scale that no reader takes");
  }
  const std::size_t sizes[] = {shape.rows, shape.tokens, shape.channels};
  const std::int64_t strides[] = {std::int64_t(shape.tokens * shape.channels),
                                  std::int64_t(shape.channels), 1};
  const unsigned said = suspicions(wide, numbers.get(), 3, sizes, strides);
  const bool even = may_have_even_channels(wide, numbers.get(), 3, sizes, strides);
  const std::uint8_t bytes[] = {std::uint8_t(said), std::uint8_t(even)};
  encoded_bytes.update(bytes, 2);
}

void some_grids() {
  for (int i = 0; i < 20; ++i) {
    const char* const names[] = {"bf16", "fp16"};
    grids<std::uint16_t>(*find_wide(names[below(2)]));
    grids<std::uint32_t>(*find_wide("fp32"));
  }
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, some_grids); }
