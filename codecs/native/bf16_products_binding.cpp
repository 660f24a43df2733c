// What Python sees of products of bf16 matrices.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <type_traits>

#include "native/bf16_products.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip {
namespace {

// Bits are signed as torch has them.
using Matrices = nb::ndarray<const std::int16_t, nb::ndim<3>, nb::device::cpu>;
using Bias = nb::ndarray<const std::int16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

bf16::Matrices matrices_of(const Matrices& m) {
  return {reinterpret_cast<const std::uint16_t*>(m.data()), m.stride(0), m.stride(1), m.stride(2)};
}

template <typename T>
void multiply(const Matrices& x, const Matrices& w, const Out<T>& out,
              const std::optional<Bias>& bias, std::size_t threads) {
  if (x.shape(0) != w.shape(0) || x.shape(2) != w.shape(2) || out.shape(0) != x.shape(0) ||
      out.shape(1) != x.shape(1) || out.shape(2) != w.shape(1) ||
      (bias && bias->shape(0) != w.shape(1)))
    throw std::invalid_argument("matrices whose shapes do not fit each other");
  bf16::Product product{matrices_of(x), matrices_of(w), x.shape(0), x.shape(1), w.shape(1),
                        x.shape(2),     nullptr,        nullptr,    nullptr};
  if (bias) product.bias = reinterpret_cast<const std::uint16_t*>(bias->data());
  if constexpr (std::is_same_v<T, float>) product.sums = out.data();
  else product.rounded = reinterpret_cast<std::uint16_t*>(out.data());
  const Computing computing;
  bf16::multiply(product, threads);
}

}  // namespace

void bind_bf16_products(nb::module_& m) {
  const char* const words =
      "Write to `out`, [batch, rows, columns], the products of bf16 matrices `x`, [batch, rows, "
      "inner], with the transposed `w`, [batch, columns, inner], as int16 bits: with `bias`, "
      "[columns], added to each row, and rounded to bf16 where `out` is int16. Each number is a "
      "sum in fp32 whose order follows from `inner` alone.";
  m.def("multiply_bf16", &multiply<std::int16_t>, "x"_a, "w"_a, "out"_a, "bias"_a.none(),
        "threads"_a, words);
  m.def("multiply_bf16", &multiply<float>, "x"_a, "w"_a, "out"_a, "bias"_a.none(), "threads"_a,
        words);
}

}  // namespace kvzip
