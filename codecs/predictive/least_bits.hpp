// What a code with a table for each channel takes at least.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {

// Counts of channels' signs and exponents. Of exponents only the low bits count, which is enough
// for a bound and keeps the counts of a head in the first-level cache.
template <typename T>
class ExponentCounts {
 public:
  ExponentCounts(const Block<const T>& numbers, std::size_t rows, std::size_t heads,
                 std::size_t dim, NumberFormat format)
      : numbers_(numbers),
        rows_(rows),
        heads_(heads),
        dim_(dim),
        format_(format),
        counts_(heads * dim * kSymbols),
        place_(dim) {}

  // Count tokens from `first` up to `end` as well.
  void add(std::size_t first, std::size_t end) {
    const int exponent = format_.mantissa_bits, sign = format_.bits() - 1;
    for (std::size_t h = 0; h < heads_; ++h) {
      std::uint32_t* const counts = counts_.data() + h * dim_ * kSymbols;
      for (std::size_t r = 0; r < rows_; ++r)
        for (std::size_t t = first; t < end; ++t) {
          const T* const at = token(r, h, t);
          const auto place = [&](std::size_t d, T number) {
            place_[d] = std::uint32_t(d * kSymbols + (number >> exponent) % (kSymbols / 2) +
                                      (number >> sign) * (kSymbols / 2));
          };
          if (numbers_.dim_stride == 1)  // in vectors
            for (std::size_t d = 0; d < dim_; ++d) place(d, at[d]);
          else
            for (std::size_t d = 0; d < dim_; ++d)
              place(d, at[std::ptrdiff_t(d) * numbers_.dim_stride]);
          for (std::size_t d = 0; d < dim_; ++d) ++counts[place_[d]];
        }
    }
    counted_ += rows_ * (end - first);
  }
  // Bits of all that was counted.
  double bits() const {
    double sum = 0;
    for (std::size_t c = 0; c < counts_.size(); c += kSymbols) {
      // n log n of all that was counted, less that of each symbol's number.
      double own = times_log(counted_);
      for (std::size_t s = 0; s < kSymbols; ++s) own -= times_log(counts_[c + s]);
      sum += own;
    }
    return sum;
  }
  // Channels that have more than one number among so many tokens.
  std::size_t varied(std::size_t tokens) const {
    std::size_t found = 0;
    for (std::size_t h = 0; h < heads_; ++h)
      for (std::size_t d = 0; d < dim_; ++d) found += varies(h, d, tokens);
    return found;
  }

 private:
  static constexpr std::size_t kSymbols = 32;

  // n log2 n; most counts are small.
  static double times_log(std::size_t n) {
    static const std::vector<double> known = [] {
      std::vector<double> of(1025);
      for (std::size_t k = 1; k < of.size(); ++k) of[k] = double(k) * std::log2(double(k));
      return of;
    }();
    return n < known.size() ? known[n] : double(n) * std::log2(double(n));
  }

  const T* token(std::size_t r, std::size_t h, std::size_t t) const {
    return numbers_.data + std::ptrdiff_t(r) * numbers_.row_stride +
           std::ptrdiff_t(h) * numbers_.head_stride + std::ptrdiff_t(t) * numbers_.token_stride;
  }
  bool varies(std::size_t h, std::size_t d, std::size_t tokens) const {
    const std::ptrdiff_t channel = std::ptrdiff_t(d) * numbers_.dim_stride;
    for (std::size_t r = 0; r < rows_; ++r)
      for (std::size_t t = 0; t < tokens; ++t)
        if (token(r, h, t)[channel] != token(0, h, 0)[channel]) return true;
    return false;
  }

  const Block<const T> numbers_;
  const std::size_t rows_, heads_, dim_;
  const NumberFormat format_;
  std::vector<std::uint32_t> counts_;  // [heads][dim][kSymbols]
  std::vector<std::uint32_t> place_;   // of a token's numbers in the counts of a head
  std::size_t counted_ = 0;
};

// Bits that no table for each channel's signs and exponents can go below, mantissas as they are:
// what `channel` takes at least for these numbers, [rows][heads][tokens][dim]. Mantissas may be
// `enough` by themselves. If not, signs and exponents of as many tokens count as it takes, up to
// all: by a table of their own they take no more than by one for all.
template <typename T>
double bits_by_channel(const Block<const T>& numbers, std::size_t rows, std::size_t heads,
                       std::size_t tokens, std::size_t dim, NumberFormat format, double enough) {
  ExponentCounts<T> counts(numbers, rows, heads, dim, format);
  // A channel that is constant costs nothing.
  const double mantissas =
      double(counts.varied(tokens)) * double(rows * tokens) * format.mantissa_bits;
  double bits = mantissas;
  std::size_t counted = 0;
  for (std::size_t parts = std::isinf(enough) ? 1 : 8; parts && bits < enough; parts /= 2) {
    counts.add(counted, tokens / parts);
    counted = tokens / parts;
    bits = mantissas + counts.bits();
  }
  return bits;
}

}  // namespace kvzip::predictive
