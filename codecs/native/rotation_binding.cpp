// What Python sees of keys before and behind RoPE.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "native/bindings.hpp"
#include "native/rotation.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip {
namespace {

template <typename T>
using Keys = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;
// So many have a number of 16 bits (rotation_kernels.hpp).
constexpr std::size_t kMostPairs = 65535;
using Positions = nb::ndarray<nb::numpy, std::uint64_t, nb::ndim<1>>;

RopeRounding rounding_of(int value) {
  if (!is_rope_rounding(value)) throw std::invalid_argument("rounding is 1 to 6");
  return RopeRounding(value);
}

template <typename T>
Rotation::Rows<T> rows_of(const Keys<T>& keys, const Rotation& rotation, std::size_t b) {
  if ((keys.stride(3) != 1 && keys.shape(3) > 1) || 2 * rotation.pairs() > keys.shape(3))
    throw std::invalid_argument("keys of another shape, or not side by side");
  return {keys.data() + std::ptrdiff_t(b) * keys.stride(0), keys.shape(1), keys.shape(2),
          keys.stride(1), keys.stride(2)};
}

template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<3>> angles_of(const Rotation& self, std::size_t first,
                                                 std::size_t positions) {
  if (positions > (std::size_t(1) << 40) / (2 * self.pairs() + 1))
    throw std::invalid_argument("too many positions");
  auto* const made = new std::vector<T>(positions * 2 * self.pairs());
  const nb::capsule owner(made, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  {
    const Computing computing;
    self.angles_of(first, positions, made->data());
  }
  return nb::ndarray<nb::numpy, T, nb::ndim<3>>(made->data(), {positions, 2, self.pairs()}, owner);
}

nb::object unturn(const Rotation& self, const Keys<const std::uint16_t>& keys, std::size_t first,
                  int rounding, const Keys<std::uint16_t>& out, std::size_t most) {
  for (std::size_t i = 0; i < 4; ++i)
    if (keys.shape(i) != out.shape(i)) throw std::invalid_argument("out has another shape");
  auto* const found = new std::vector<std::uint64_t>();
  const nb::capsule owner(
      found, [](void* p) noexcept { delete static_cast<std::vector<std::uint64_t>*>(p); });
  const RopeRounding how = rounding_of(rounding);
  bool few = true;
  {
    const Computing computing;
    const std::size_t each = keys.shape(1) * keys.shape(2) * self.pairs();
    for (std::size_t b = 0; few && b < keys.shape(0); ++b) {
      std::vector<std::uint64_t> missing;
      few = self.unturn(rows_of<const std::uint16_t>(keys, self, b), first, how,
                        rows_of<std::uint16_t>(out, self, b), most - found->size(), &missing);
      for (const std::uint64_t place : missing) found->push_back(b * each + place);
    }
  }
  if (!few) return nb::none();
  return nb::cast(Positions(found->data(), {found->size()}, owner));
}

}  // namespace

void bind_rotation(nb::module_& m) {
  nb::class_<Rotation>(m, "Rotation",
                       "RoPE as models compute it in bf16: it turns the numbers i and i + pairs of "
                       "each head, or 2 i and 2 i + 1.")
      .def(
          "__init__",
          [](Rotation* self, const nb::ndarray<const float, nb::ndim<1>, nb::device::cpu>& radians,
             float scale) {
            if (radians.stride(0) != 1 && radians.shape(0) > 1)
              throw std::invalid_argument("frequencies that are not side by side");
            if (radians.shape(0) > kMostPairs) throw std::length_error("more than 65,535 pairs");
            new (self) Rotation(radians.data(), radians.shape(0), scale);
          },
          "frequencies"_a, "scale"_a = 1.0f,
          "`frequencies`: radians a position of each pair; `scale`: what cosines and sines are "
          "multiplied by.")
      .def_prop_ro("pairs", &Rotation::pairs, "How many pairs of each head are turned.")
      .def("angles_of", &angles_of<std::uint16_t>, "first"_a, "positions"_a,
           "Those of so many positions from `first` on, in bf16: uint16 [positions, 2, pairs].")
      .def("wide_angles_of", &angles_of<float>, "first"_a, "positions"_a,
           "The same before they are rounded to bf16: float32 [positions, 2, pairs].")
      .def(
          "turn",
          [](const Rotation& self, const Keys<std::uint16_t>& keys, std::size_t first,
             int rounding) {
            const RopeRounding how = rounding_of(rounding);
            const Computing computing;
            for (std::size_t b = 0; b < keys.shape(0); ++b)
              self.turn(rows_of<std::uint16_t>(keys, self, b), first, how);
          },
          "keys"_a, "first"_a, "rounding"_a,
          "Turn keys where they are: bf16 bits, uint16 [batch, heads, tokens, dim], of which the "
          "first token stands at the position `first`. `rounding`: 1, products and sums are "
          "rounded to bf16; 2, sums only; 3, sums only, and cosines and sines are float32; 4, 5 "
          "and "
          "6, likewise, of pairs 2 i and 2 i + 1.")
      .def("unturn", &unturn, "keys"_a, "first"_a, "rounding"_a, "out"_a, "most"_a,
           "Write to `out`, of the same shape, numbers that `turn` makes these keys of, bit for "
           "bit; "
           "numbers that are not turned are left. The pairs for which there are none, counted in "
           "the "
           "order of [batch, heads, tokens, pairs]: uint64; they are written as they are. None "
           "when there would be more than `most`.");
}

}  // namespace kvzip
