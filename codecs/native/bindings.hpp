// What bindings share. Each codec with compiled code adds its functions to the one module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "native/float_environment.hpp"

namespace kvzip {

// What takes Python's lock when the interpreter has ended does not return, in a thread that nobody
// waits for (a daemon). Before 3.14 Python ends such a thread by unwinding it, which destructors do
// not let through, so that the process would be aborted; here the thread waits for the process to
// end, as from 3.14 on.
template <typename Take>
auto taking_the_lock(const Take& take) noexcept {
  try {
    return take();
  } catch (...) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Python's lock is given up while this is.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() {
    taking_the_lock([this] { PyEval_RestoreThread(state_); });
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// It is held while this is.
class Locked {
 public:
  Locked() : state_(taking_the_lock([] { return PyGILState_Ensure(); })) {}
  ~Locked() { PyGILState_Release(state_); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  PyGILState_STATE state_;
};

// For work on numbers: without Python's lock, and with floating point as it is by default.
class Computing {
  Unlocked unlocked_;
  DefaultEnvironment environment_;
};

// Python buffers that are held as long as this is.
class Views {
 public:
  Views() = default;
  Views(const Views&) = delete;
  ~Views() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
  }
  // It stays where it is.
  const Py_buffer& add(nanobind::handle object, int flags) {
    Py_buffer& view = views_.emplace_back();
    if (PyObject_GetBuffer(object.ptr(), &view, flags)) {
      views_.pop_back();
      throw nanobind::python_error();
    }
    return view;
  }
  auto begin() const { return views_.begin(); }
  auto end() const { return views_.end(); }

 private:
  std::deque<Py_buffer> views_;
};

// A copy of a buffer's records.
template <typename Record>
std::vector<Record> records_of(Views* views, nanobind::handle object) {
  const Py_buffer& view = views->add(object, PyBUF_SIMPLE);
  std::vector<Record> found(std::size_t(view.len) / sizeof(Record));
  if (!found.empty()) std::memcpy(found.data(), view.buf, found.size() * sizeof(Record));
  return found;
}

// Numbers of Python's own, a row each.
template <typename U, typename Row>
auto rows_of(std::vector<Row>&& rows) {
  auto* const kept = new std::vector<Row>(std::move(rows));
  const nanobind::capsule owner(kept,
                                [](void* p) noexcept { delete static_cast<std::vector<Row>*>(p); });
  return nanobind::ndarray<nanobind::numpy, U, nanobind::ndim<2>>(
      reinterpret_cast<U*>(kept->data()), {kept->size(), sizeof(Row) / sizeof(U)}, owner);
}

void bind_bf16_products(nanobind::module_& m);
void bind_index(nanobind::module_& m);
void bind_json(nanobind::module_& m);
void bind_output(nanobind::module_& m);
void bind_rotation(nanobind::module_& m);
void bind_spans(nanobind::module_& m);
}  // namespace kvzip
namespace kvzip::grid {
void bind(nanobind::module_& m);
}
namespace kvzip::planes {
void bind(nanobind::module_& m);
}
namespace kvzip::channel {
void bind(nanobind::module_& m);
void bind_gpu(nanobind::module_& m);
}  // namespace kvzip::channel
namespace kvzip::predictive {
void bind(nanobind::module_& m);
void bind_gpu(nanobind::module_& m);
}  // namespace kvzip::predictive
