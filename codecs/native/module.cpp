// The nanobind module kvzip.codecs._native.
#include <nanobind/stl/vector.h>

#include "native/bindings.hpp"
#include "native/simd.hpp"
#include "native/xxh3.hpp"

NB_MODULE(_native, m) {
  namespace nb = nanobind;
  namespace simd = kvzip::simd;
  m.doc() = "Compiled kernels of the built-in codecs.";
  m.def("simd", [] { return simd::name_of(simd::level()); },
        "The instruction set in use: \"scalar\", \"avx2\" or \"avx512\".");
  m.def(
      "set_simd", [](const char* name) { return simd::set_level(simd::from_name(name)); },
      nb::arg("name"), "Use another; False when this processor does not have it.");
  m.def(
      "xxh3_64",
      [](const std::vector<nb::bytes>& pieces) {
        kvzip::Xxh3 hash;
        for (const nb::bytes& piece : pieces) hash.update(piece.c_str(), piece.size());
        return hash.digest();
      },
      nb::arg("pieces"), "XXH3-64 of pieces one after the other, as kernels take it; for tests.");
  kvzip::bind_output(m);
  kvzip::planes::bind(m);
  kvzip::channel::bind(m);
  kvzip::predictive::bind(m);
}
