// What bindings share. Each codec with compiled code adds its functions to the one module.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <vector>

namespace kvzip {

// Python buffers that are held as long as this is.
class Views {
 public:
  explicit Views(std::size_t n) { views_.reserve(n); }
  Views(const Views&) = delete;
  ~Views() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
  }
  const Py_buffer& add(nanobind::handle object, int flags) {
    Py_buffer view;
    if (PyObject_GetBuffer(object.ptr(), &view, flags)) throw nanobind::python_error();
    views_.push_back(view);
    return views_.back();
  }
  auto begin() const { return views_.begin(); }
  auto end() const { return views_.end(); }

 private:
  std::vector<Py_buffer> views_;
};

void bind_output(nanobind::module_& m);
}
namespace kvzip::planes {
void bind(nanobind::module_& m);
}
namespace kvzip::channel {
void bind(nanobind::module_& m);
}
namespace kvzip::predictive {
void bind(nanobind::module_& m);
}
