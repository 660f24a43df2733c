// What a JSON file holds as Python has it, looked at and copied.
#include <cmath>

#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip {
namespace {

bool fits(PyObject* number) {
  int overflow = 0;
  (void)PyLong_AsLongLongAndOverflow(number, &overflow);
  if (overflow <= 0) return overflow == 0;
  (void)PyLong_AsUnsignedLongLong(number);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool is_text(PyObject* word) {
  Py_ssize_t size = 0;
  if (PyUnicode_AsUTF8AndSize(word, &size)) return true;
  PyErr_Clear();  // half of a surrogate pair
  return false;
}

// Puts a copy of its own in the place of a container. False where `value` is nothing that JSON
// gives back as it was, or nests deeper than `levels`.
bool copy(nb::object* value, int levels);

bool copy_list(nb::object* value, int levels) {
  nb::object made = nb::steal(PySequence_List(value->ptr()));
  if (!made.is_valid()) throw nb::python_error();
  const Py_ssize_t size = PyList_Size(made.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    nb::object item = nb::borrow(PyList_GetItem(made.ptr(), i));
    const PyObject* const before = item.ptr();
    if (!copy(&item, levels)) return false;
    if (item.ptr() != before) PyList_SetItem(made.ptr(), i, item.release().ptr());
  }
  *value = made;
  return true;
}

bool copy_dict(nb::object* value, int levels) {
  nb::object made = nb::steal(PyDict_Copy(value->ptr()));
  if (!made.is_valid()) throw nb::python_error();
  PyObject *key, *found;
  // Nobody else knows of it, and setting the value of a key that is there moves nothing.
  for (Py_ssize_t at = 0; PyDict_Next(made.ptr(), &at, &key, &found);) {
    if (Py_TYPE(key) != &PyUnicode_Type || !is_text(key)) return false;
    nb::object item = nb::borrow(found);
    if (!copy(&item, levels)) return false;
    if (item.ptr() != found && PyDict_SetItem(made.ptr(), key, item.ptr()))
      throw nb::python_error();
  }
  *value = made;
  return true;
}

bool copy(nb::object* value, int levels) {
  PyObject* const held = value->ptr();
  const PyTypeObject* const type = Py_TYPE(held);
  if (type == &PyUnicode_Type) return is_text(held);
  if (type == &PyFloat_Type) return std::isfinite(PyFloat_AsDouble(held));
  if (type == &PyLong_Type) return fits(held);
  if (held == Py_None || type == &PyBool_Type) return true;
  if (levels < 1) return false;
  if (type == &PyList_Type || type == &PyTuple_Type) return copy_list(value, levels - 1);
  return type == &PyDict_Type && copy_dict(value, levels - 1);
}

nb::object json_copy(nb::object value, int levels) {
  return copy(&value, levels) ? value : nb::borrow(Py_NotImplemented);
}

}  // namespace

void bind_json(nb::module_& m) {
  m.def(
      "json_copy", &json_copy, "value"_a.none(), "levels"_a,
      "A copy of None, bool, int of 64 bits, finite float, str that UTF-8 can hold, and of lists, "
      "tuples (which become lists) and dicts of these, `levels` deep at most; NotImplemented for "
      "all else, subclasses too.");
}

}  // namespace kvzip
