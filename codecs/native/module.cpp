// The nanobind module kvzip.codecs._native.
#include <optional>

#include "native/bindings.hpp"
#include "native/simd.hpp"
#include "native/xxh3.hpp"

namespace kvzip {
namespace {

std::uint64_t hash_of(const nanobind::args& pieces) {
  Views views;
  std::size_t size = 0;
  for (nanobind::handle piece : pieces) size += std::size_t(views.add(piece, PyBUF_SIMPLE).len);
  Xxh3 hash;
  const auto update = [&] {
    for (const Py_buffer& view : views) hash.update(view.buf, std::size_t(view.len));
  };
  if (size < 1u << 16) {  // to give up the lock would take as long
    update();
  } else {
    const Unlocked unlocked;
    update();
  }
  return hash.digest();
}

// For a `with` statement.
using Environment = std::optional<DefaultEnvironment>;

}  // namespace
}  // namespace kvzip

NB_MODULE(_native, m) {
  namespace nb = nanobind;
  namespace simd = kvzip::simd;
  // At the interpreter's end, threads that it does not wait for may still hold objects: that is no
  // leak. tests/soak/leaks.py looks for those that are.
  nb::set_leak_warnings(false);
  // No ValueError: those say that data or arguments are wrong.
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const simd::Unavailable& error) {
      PyErr_SetString(nb::module_::import_("kvzip.errors").attr("UnsupportedError").ptr(),
                      error.what());
    }
  });
  m.doc() = "Compiled kernels of the built-in codecs.";
  m.def(
      "simd", [] { return simd::name_of(simd::level()); },
      "The instruction set in use: \"scalar\", \"avx2\", \"avx512\" or \"neon\".");
  m.def(
      "set_simd", [](const char* name) { return simd::set_level(simd::from_name(name)); },
      nb::arg("name"), "Use another; False when this processor does not have it.");
  m.def("xxh3_64", kvzip::hash_of, "XXH3-64 of contiguous buffers, one after the other.");
  nb::class_<kvzip::Environment>(
      m, "DefaultEnvironment",
      "A context in which the thread computes with floating point as IEEE 754 begins: rounding to "
      "the nearest, subnormals kept.")
      .def(nb::init<>())
      .def("__enter__", [](kvzip::Environment& self) { self.emplace(); })
      .def(
          "__exit__",
          [](kvzip::Environment& self, nb::handle, nb::handle, nb::handle) { self.reset(); },
          nb::arg("type").none(), nb::arg("value").none(), nb::arg("traceback").none());
  kvzip::bind_bf16_products(m);
  kvzip::bind_index(m);
  kvzip::bind_json(m);
  kvzip::bind_output(m);
  kvzip::bind_rotation(m);
  kvzip::bind_spans(m);
  kvzip::grid::bind(m);
  kvzip::planes::bind(m);
  kvzip::channel::bind(m);
  kvzip::channel::bind_gpu(m);
  kvzip::predictive::bind(m);
  kvzip::predictive::bind_gpu(m);
}
