// Squares of numbers turned so that rows become columns: tokens with their channels beside each
// other become channels with their tokens beside each other, and back.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

// N x N numbers, a vector for each row.
template <typename T, int N>
struct Square {
  typedef T Row __attribute__((vector_size(sizeof(T) * N)));
  Row row[N];

  void load(int i, const T* from) { std::memcpy(&row[i], from, sizeof(Row)); }
  void store(int i, T* to) const { std::memcpy(to, &row[i], sizeof(Row)); }
  void transpose() { transpose(std::make_integer_sequence<int, N>()); }

 private:
  // Rows are shuffled together like two halves of a deck of cards, log2(N) times.
  template <int... i>
  void transpose(std::integer_sequence<int, i...>) {
#pragma GCC unroll 4
    for (int step = 1; step < N; step *= 2) {
      Row mixed[N];
#pragma GCC unroll 8
      for (int k = 0; k < N / 2; ++k) {
        mixed[2 * k] = __builtin_shufflevector(row[k], row[k + N / 2], (i % 2 * N + i / 2)...);
        mixed[2 * k + 1] =
            __builtin_shufflevector(row[k], row[k + N / 2], (i % 2 * N + i / 2 + N / 2)...);
      }
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) row[k] = mixed[k];
    }
  }
};

// to[i][t] = rows[t][i] for the first `width` numbers of each row, N by N; to: [width][kTile].
template <int N, typename T>
void to_columns(const T* const* rows, std::size_t width, T* to) {
  for (std::size_t t = 0; t < kTile; t += N) {
    std::size_t i = 0;
    for (; i + N <= width; i += N) {
      Square<T, N> square;
      for (int k = 0; k < N; ++k) square.load(k, rows[t + std::size_t(k)] + i);
      square.transpose();
      for (int k = 0; k < N; ++k) square.store(k, to + (i + std::size_t(k)) * kTile + t);
    }
    for (; i < width; ++i)
      for (std::size_t k = t; k < t + N; ++k) to[i * kTile + k] = rows[k][i];
  }
}

}  // namespace
}  // namespace kvzip::predictive
