// What Python sees of grids: sizes are checked and memory is allocated here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "native/bindings.hpp"
#include "native/grid.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::grid {
namespace {

template <typename T>
using Cube = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using AnyCube = nb::ndarray<nb::ndim<3>, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

const Wide& wide_of(const char* name, const nb::dlpack::dtype& dtype) {
  const Wide* wide = find_wide(name);
  if (!wide) throw std::invalid_argument("no wide format " + std::string(name));
  if (dtype.code != std::uint8_t(nb::dlpack::dtype_code::UInt) || dtype.bits != wide->bits ||
      dtype.lanes != 1)
    throw std::invalid_argument("integers of another size than " + std::string(name));
  return *wide;
}

const Narrow& narrow_of(const char* name) {
  const Narrow* narrow = find_narrow(name);
  if (!narrow) throw std::invalid_argument("no narrow format " + std::string(name));
  return *narrow;
}

template <typename Array>
Shape shape_of(const Array& array, std::size_t group_tokens, std::size_t group_channels) {
  if (!group_tokens || !group_channels) throw std::invalid_argument("a group of no numbers");
  return {array.shape(0), array.shape(1), array.shape(2), group_tokens, group_channels};
}

template <typename T>
std::vector<Scale> scales_of(ScaleFormat format, const Cube<const T>& bits) {
  std::vector<Scale> scales(bits.size());
  for (std::size_t i = 0; i < scales.size(); ++i)
    if (!read(format, bits.data()[i], scales[i]))
      throw std::invalid_argument("a scale that is no positive, finite number");
  return scales;
}

std::vector<Scale> read_scales(const nb::object& scales, const char* name) {
  const std::string format = name;
  if (format == "e8m0")
    return scales_of(ScaleFormat::e8m0, nb::cast<Cube<const std::uint8_t>>(scales));
  if (format == "bf16")
    return scales_of(ScaleFormat::bf16, nb::cast<Cube<const std::uint16_t>>(scales));
  if (format == "fp32")
    return scales_of(ScaleFormat::fp32, nb::cast<Cube<const std::uint32_t>>(scales));
  throw std::invalid_argument("no format of scales " + format);
}

void widen_any(const Cube<const std::uint8_t>& codes, const nb::object& scale_bits,
               const char* scale_name, const char* narrow_name, const char* wide_name,
               bool through_fp32, std::size_t group_tokens, std::size_t group_channels,
               std::size_t first_token, const AnyCube& out) {
  const Wide& wide = wide_of(wide_name, out.dtype());
  const Narrow& narrow = narrow_of(narrow_name);
  const Shape shape = shape_of(codes, group_tokens, group_channels);
  for (int i = 0; i < 3; ++i)
    if (out.shape(i) != codes.shape(i)) throw std::invalid_argument("`out` of another shape");
  if (out.stride(2) != 1 && shape.channels > 1)
    throw std::invalid_argument("`out` whose channels do not lie side by side");
  if (!codes.size()) return;
  const std::vector<Scale> scales = read_scales(scale_bits, scale_name);
  const auto sizes = nb::cast<nb::tuple>(scale_bits.attr("shape"));
  const auto scale_rows = nb::cast<std::size_t>(sizes[1]);
  if (nb::cast<std::size_t>(sizes[0]) != shape.rows ||
      nb::cast<std::size_t>(sizes[2]) != shape.scale_columns())
    throw std::invalid_argument("scales of another shape");
  if (first_token > SIZE_MAX - shape.tokens ||
      (first_token + shape.tokens - 1) / group_tokens >= scale_rows)
    throw std::invalid_argument("scales of fewer tokens");
  const Rounding rounding = through_fp32 ? Rounding::through_fp32 : Rounding::once;
  const std::uint8_t* from = codes.data();
  void* to = out.data();
  const std::int64_t row = out.stride(0), token = out.stride(1);
  const Computing computing;
  if (wide.bits == 16)
    widen(wide, narrow, rounding, shape, from, scales.data(), scale_rows, first_token,
          static_cast<std::uint16_t*>(to), row, token);
  else
    widen(wide, narrow, rounding, shape, from, scales.data(), scale_rows, first_token,
          static_cast<std::uint32_t*>(to), row, token);
}

template <typename T>
void fit_any(const Cube<const T>& numbers, const char* wide_name, const char* narrow_name,
             bool through_fp32, std::size_t group_tokens, std::size_t group_channels,
             const Cube<std::uint8_t>& codes, const Cube<std::uint32_t>& scales) {
  const Wide& wide = wide_of(wide_name, numbers.dtype());
  const Narrow& narrow = narrow_of(narrow_name);
  const Shape shape = shape_of(numbers, group_tokens, group_channels);
  for (int i = 0; i < 3; ++i)
    if (codes.shape(i) != numbers.shape(i)) throw std::invalid_argument("codes of another shape");
  if (scales.shape(0) != shape.rows || scales.shape(1) != shape.scale_rows() ||
      scales.shape(2) != shape.scale_columns())
    throw std::invalid_argument("scales of another shape");
  const Rounding rounding = through_fp32 ? Rounding::through_fp32 : Rounding::once;
  const Computing computing;
  fit(wide, narrow, rounding, shape, numbers.data(), codes.data(), scales.data());
}

// An array of two or more axes, of any strides.
struct Strided {
  explicit Strided(const AnyArray& numbers) : dimensions(int(numbers.ndim())) {
    if (dimensions < 2 || dimensions > 32) throw std::invalid_argument("want 2 to 32 axes");
    for (int i = 0; i < dimensions; ++i) {
      shape[i] = numbers.shape(std::size_t(i));
      strides[i] = numbers.stride(std::size_t(i));
      empty |= !shape[i];
    }
  }

  int dimensions;
  bool empty = false;
  std::size_t shape[32];
  std::int64_t strides[32];
};

// What `look` says of an array's numbers, in their own width; `of_none` where there are none.
template <typename Found, class Look>
Found looked_at(const AnyArray& numbers, const char* wide_name, Found of_none, const Look& look) {
  const Wide& wide = wide_of(wide_name, numbers.dtype());
  const Strided of(numbers);
  if (of.empty) return of_none;
  const DefaultEnvironment environment;
  if (wide.bits == 16) return look(wide, static_cast<const std::uint16_t*>(numbers.data()), of);
  return look(wide, static_cast<const std::uint32_t*>(numbers.data()), of);
}

unsigned suspicions_of(const AnyArray& numbers, const char* wide_name) {
  return looked_at(numbers, wide_name, 0u, [](auto& wide, auto* first, auto& of) {
    return suspicions(wide, first, of.dimensions, of.shape, of.strides);
  });
}

bool may_have_even_channels_of(const AnyArray& numbers, const char* wide_name) {
  return looked_at(numbers, wide_name, false, [](auto& wide, auto* first, auto& of) {
    return may_have_even_channels(wide, first, of.dimensions, of.shape, of.strides);
  });
}

}  // namespace

void bind(nb::module_& m) {
  m.attr("GRID_SHARE_OF_GROUP") = kOfGroup;
  m.def("grid_widen", &widen_any, "codes"_a, "scales"_a, "scale"_a, "narrow"_a, "wide"_a,
        "through_fp32"_a, "group_tokens"_a, "group_channels"_a, "first_token"_a, "out"_a,
        "Fill `out`, [rows, tokens, channels], with codes times scales, rounded.");
  m.def("grid_fit", &fit_any<std::uint16_t>, "numbers"_a.noconvert(), "wide"_a, "narrow"_a,
        "through_fp32"_a, "group_tokens"_a, "group_channels"_a, "codes"_a.noconvert(),
        "scales"_a.noconvert());
  m.def("grid_fit", &fit_any<std::uint32_t>, "numbers"_a.noconvert(), "wide"_a, "narrow"_a,
        "through_fp32"_a, "group_tokens"_a, "group_channels"_a, "codes"_a.noconvert(),
        "scales"_a.noconvert(),
        "Fill `codes` and `scales` (bits of fp32) with those that explain most of the numbers.");
  m.def("grid_suspicions", &suspicions_of, "numbers"_a, "wide"_a,
        "What a few of the numbers say: the bits of grid::Suspicion.");
  m.def("grid_may_have_even_channels", &may_have_even_channels_of, "numbers"_a, "wide"_a,
        "False only where no half of the channels is multiples of a step along the tokens.");
}

}  // namespace kvzip::grid
