// A file that grows in memory and becomes a bytes object without a copy.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip {
namespace {

// The object is nobody else's until it is taken out, so it may be written to and resized.
class Output {
 public:
  explicit Output(std::size_t capacity) {
    bytes_ = PyBytes_FromStringAndSize(nullptr, Py_ssize_t(capacity));
    if (!bytes_) throw nb::python_error();
    advise();
  }
  Output(const Output&) = delete;
  ~Output() { Py_XDECREF(bytes_); }

  std::size_t write(nb::handle object) {
    Py_buffer view;
    if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_SIMPLE)) throw nb::python_error();
    const auto n = std::size_t(view.len);
    try {
      if (n && (at_ > kMost || n > kMost - at_))
        throw std::overflow_error("more bytes than an object can have");
      reserve(n ? at_ + n : 0);
    } catch (...) {
      PyBuffer_Release(&view);
      throw;
    }
    if (n) {
      const Unlocked unlocked;
      if (at_ > size_) std::memset(begin() + size_, 0, at_ - size_);
      std::memcpy(begin() + at_, view.buf, n);
    }
    PyBuffer_Release(&view);
    at_ += n;
    if (n && at_ > size_) size_ = at_;
    return n;
  }
  std::size_t seek(std::size_t at) { return at_ = at; }
  std::size_t tell() const { return at_; }

  nb::object take() {
    if (!bytes_) throw std::invalid_argument("taken already");
    resize(size_);
    PyObject* const taken = bytes_;
    bytes_ = nullptr;
    return nb::steal(taken);
  }

 private:
  char* begin() const { return PyBytes_AsString(bytes_); }
  std::size_t capacity() const { return std::size_t(PyBytes_Size(bytes_)); }

  void resize(std::size_t size) {
#ifdef Py_LIMITED_API  // by which no bytes object changes its size
    if (size != capacity()) copy(size);
#else
    // Memory that is given back smaller than it was taken is fresh the next time and costs a fault
    // a page: glibc takes from its heap what was once given back at that size, and more from the
    // kernel.
    const std::size_t unused = capacity() - std::min(capacity(), size);
    if (size <= capacity() && unused <= capacity() / kUnused) {
      Py_SET_SIZE(bytes_, Py_ssize_t(size));
      begin()[size] = 0;
    } else if (unused && capacity() <= kSmall) {
      copy(size);
    } else if (_PyBytes_Resize(&bytes_, Py_ssize_t(size))) {
      throw nb::python_error();
    }
#endif
  }
  void copy(std::size_t size) {
    PyObject* const other = PyBytes_FromStringAndSize(nullptr, Py_ssize_t(size));
    if (!other) throw nb::python_error();
    std::memcpy(PyBytes_AsString(other), begin(), size_);
    Py_DECREF(bytes_);
    bytes_ = other;
  }
  void reserve(std::size_t size) {
    if (!bytes_) throw std::invalid_argument("taken already");
    if (size <= capacity()) return;
    resize(size + size / 4);
    advise();
  }
  // Fresh memory costs a fault a page; large pages are 512 times fewer.
  void advise() const {
#ifdef __linux__
    constexpr std::size_t kPage = std::size_t(1) << 21;
    const auto from = (reinterpret_cast<std::uintptr_t>(begin()) + kPage - 1) & ~(kPage - 1);
    const auto to = (reinterpret_cast<std::uintptr_t>(begin()) + capacity()) & ~(kPage - 1);
    if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  }

  // Room is made for a quarter more than is written.
  static constexpr std::size_t kMost = PY_SSIZE_T_MAX / 2;
  // One part of so many may be left unused behind the bytes; and what is copied rather than made
  // smaller.
  static constexpr std::size_t kUnused = 16, kSmall = std::size_t(4) << 20;

  PyObject* bytes_;
  std::size_t at_ = 0, size_ = 0;
};

}  // namespace

void bind_output(nb::module_& m) {
  nb::class_<Output>(m, "Output", "A binary file in memory, to be written; not for two threads.")
      .def(nb::init<std::size_t>(), "capacity"_a,
           "Room for so many bytes, which are not touched before they are written.")
      .def("write", &Output::write, "data"_a)
      .def("seek", &Output::seek, "position"_a)
      .def("tell", &Output::tell)
      .def("take", &Output::take, "All that was written, as bytes, once.");
}

}  // namespace kvzip
