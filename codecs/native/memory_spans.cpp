// Where arrays lie in memory, and which of them lie apart.
#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "native/bindings.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip {
namespace {

struct Span {
  std::intptr_t begin, end;
  std::size_t number;
  bool plain;  // each axis steps over all that the finer ones reach: no two numbers in one place
};

Span span_of(const Py_buffer& array, std::size_t number) {
  Span span{reinterpret_cast<std::intptr_t>(array.buf), 0, number, true};
  span.end = span.begin + array.itemsize;
  std::vector<std::pair<Py_ssize_t, Py_ssize_t>> axes;
  for (int i = 0; i < array.ndim; ++i) {
    if (array.shape[i] < 2) continue;
    const Py_ssize_t reach = array.strides[i] * (array.shape[i] - 1);
    (reach < 0 ? span.begin : span.end) += reach;
    axes.emplace_back(std::abs(array.strides[i]), array.shape[i]);
  }
  std::sort(axes.begin(), axes.end());
  Py_ssize_t reach = array.itemsize;
  for (const auto& [stride, size] : axes) {
    span.plain = span.plain && stride >= reach;
    reach += stride * (size - 1);
  }
  return span;
}

// An array that is alone and plain is in no group.
nb::list close_to_each_other(const nb::list& arrays) {
  Views views;
  std::vector<Span> spans;
  std::size_t number = 0;
  for (nb::handle array : arrays) {
    const Py_buffer& view = views.add(array, PyBUF_STRIDES);
    if (view.len) spans.push_back(span_of(view, number));
    ++number;
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  nb::list groups;
  for (auto first = spans.begin(), after = first; first != spans.end(); first = after) {
    std::intptr_t end = first->end;
    for (++after; after != spans.end() && after->begin < end; ++after)
      end = std::max(end, after->end);
    if (after - first == 1 && first->plain) continue;
    nb::list group;
    for (auto span = first; span != after; ++span) group.append(span->number);
    groups.append(group);
  }
  return groups;
}

}  // namespace

void bind_spans(nb::module_& m) {
  m.def("close_to_each_other", &close_to_each_other, "arrays"_a,
        "The numbers of arrays that may have memory in common, or within themselves, in groups: "
        "those of a group lie within one stretch of memory, apart from all others.");
}

}  // namespace kvzip
