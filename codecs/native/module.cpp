// The nanobind module kvzip.codecs._native.
#include "native/bindings.hpp"
#include "native/simd.hpp"

NB_MODULE(_native, m) {
  namespace nb = nanobind;
  namespace simd = kvzip::simd;
  m.doc() = "Compiled kernels of the built-in codecs.";
  m.def("simd", [] { return simd::name_of(simd::level()); },
        "The instruction set in use: \"scalar\", \"avx2\" or \"avx512\".");
  m.def(
      "set_simd", [](const char* name) { return simd::set_level(simd::from_name(name)); },
      nb::arg("name"), "Use another; False when this processor does not have it.");
  kvzip::planes::bind(m);
  kvzip::channel::bind(m);
  kvzip::predictive::bind(m);
}
