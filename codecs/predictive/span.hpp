// Arrays that somebody else holds, and their sizes checked.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvzip::predictive {

template <typename T>
struct Span {
  const T* data = nullptr;
  std::size_t size = 0;
};

// The array, if it has that size; else throws std::invalid_argument.
template <typename T>
const T* look(Span<T> array, std::size_t size, const char* what) {
  if (array.size != size) throw std::invalid_argument(std::string(what) + " has another size");
  return array.data;
}
// A copy of it, likewise.
template <typename T>
std::vector<T> take(Span<T> array, std::size_t size, const char* what) {
  const T* from = look(array, size, what);
  return std::vector<T>(from, from + size);
}

}  // namespace kvzip::predictive
