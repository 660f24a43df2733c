// What Python sees of the bit planes: sizes are checked and memory is allocated here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "native/bindings.hpp"
#include "planes/kernels.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::planes {
namespace {

template <typename T>
using Flat = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array = nb::ndarray<nb::numpy, T>;

// A new numpy array of this shape, its numbers not set.
template <typename T>
Array<T> empty(std::initializer_list<std::size_t> shape) {
  std::size_t size = 1;
  for (std::size_t n : shape) size *= n;
  auto* data = new T[size];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Array<T>(data, shape, owner);
}

template <typename T>
Array<std::uint8_t> split(Flat<T> in) {
  const std::size_t n = in.shape(0);
  auto out = empty<std::uint8_t>({8 * sizeof(T), (n + 7) / 8});
  const Unlocked unlocked;
  split_bits(in.data(), n, out.data());
  return out;
}

template <typename T>
Array<T> join(const Planes& planes, std::size_t n) {
  auto out = empty<T>({n});
  const Unlocked unlocked;
  join_bits(planes.data(), n, out.data());
  return out;
}

nb::object join_any(const Planes& planes, std::size_t n) {
  if (planes.shape(1) != (n + 7) / 8) throw std::invalid_argument("planes of another size");
  switch (planes.shape(0)) {
    case 8: return nb::cast(join<std::uint8_t>(planes, n));
    case 16: return nb::cast(join<std::uint16_t>(planes, n));
    case 32: return nb::cast(join<std::uint32_t>(planes, n));
    default: throw std::invalid_argument("want 8, 16 or 32 planes");
  }
}

}  // namespace

void bind(nb::module_& m) {
  m.def("split_bits", &split<std::uint8_t>, "numbers"_a);
  m.def("split_bits", &split<std::uint16_t>, "numbers"_a);
  m.def("split_bits", &split<std::uint32_t>, "numbers"_a,
        "Bit planes of an array of unsigned integers, most significant first: uint8 [bits, n/8].");
  m.def("join_bits", &join_any, "planes"_a, "n"_a, "The inverse of split_bits, for n numbers.");
}

}  // namespace kvzip::planes
