// The nanobind module kvzip.codecs._native.
#include "native/bindings.hpp"

NB_MODULE(_native, m) {
  m.doc() = "Compiled kernels of the built-in codecs.";
  kvzip::planes::bind(m);
  kvzip::channel::bind(m);
}
