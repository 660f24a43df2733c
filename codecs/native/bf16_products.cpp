#include "native/bf16_products.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#ifdef KVZIP_X86
#include <emmintrin.h>
#endif

#include "native/bf16_products_kernels.hpp"
#include "native/float_environment.hpp"
#include "native/simd.hpp"

namespace kvzip::bf16 {

constexpr Kernels baseline = kernels_here;

namespace {

// Blocks of `w`, 192 columns of 1,024 numbers (384 KB), stay in the second-level cache while rows
// go past them; six rows, those of a tile, stay in the first. Sums are cut there, whatever the
// rows.
constexpr std::size_t kInner = 1024, kColumns = 192, kRows = 240;
// Columns of a thread are whole tiles.
constexpr std::size_t kTiles = 12;
// So many products of numbers take several times as long as a thread takes to begin.
constexpr std::size_t kWorthAThread = std::size_t(1) << 22;

constexpr std::size_t filled(std::size_t inner) { return (inner + kStep - 1) / kStep * kStep; }

float wide(std::uint16_t bits) {
  const std::uint32_t word = std::uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Eight numbers of each of eight rows, rows as columns.
constexpr std::size_t kSquare = 8;
void turn_square(const std::uint16_t* from, std::ptrdiff_t from_stride, std::uint16_t* to,
                 std::size_t to_stride) {
#ifdef KVZIP_X86
  __m128i rows[kSquare], next[kSquare];
  for (std::size_t i = 0; i < kSquare; ++i)
    rows[i] =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + std::ptrdiff_t(i) * from_stride));
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < kSquare / 2; ++i) {
      next[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + kSquare / 2]);
      next[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + kSquare / 2]);
    }
    std::copy_n(next, kSquare, rows);
  }
  for (std::size_t i = 0; i < kSquare; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), rows[i]);
#else
  for (std::size_t i = 0; i < kSquare; ++i)
    for (std::size_t j = 0; j < kSquare; ++j)
      to[i * to_stride + j] = from[std::ptrdiff_t(j) * from_stride + std::ptrdiff_t(i)];
#endif
}

const Kernels& kernels() {
#ifdef KVZIP_X86
  if (simd::vectors() != simd::Level::scalar && simd::has_fma()) return avx2;
#endif
  return baseline;
}

// Computes columns, with memory of its own. Columns of all the batch are counted in one.
class Part {
 public:
  explicit Part(const Product& product)
      : p_(product),
        kernels_(kernels()),
        stride_(filled(product.inner)),
        x_(new float[std::min(product.rows, kRows) * stride_]),
        sums_(new float[std::min(product.rows, kRows) * kColumns]) {
    if (product.w.inner == 1 && product.inner % kStep == 0) return;
    packed_stride_ = std::min(stride_, kInner) + kStep;
    packed_.reset(new std::uint16_t[kColumns * packed_stride_]);
  }

  void run(std::size_t first, std::size_t last) {
    while (first < last) {
      const std::size_t b = first / p_.columns, column = first % p_.columns;
      const std::size_t columns = std::min(p_.columns - column, last - first);
      for (std::size_t row = 0; row < p_.rows; row += kRows) {
        const std::size_t rows = std::min(p_.rows - row, kRows);
        widen(b, row, rows);
        for (std::size_t n = 0; n < columns; n += kColumns)
          multiply(b, row, rows, column + n, std::min(columns - n, kColumns));
      }
      first += columns;
    }
  }

 private:
  void widen(std::size_t b, std::size_t row, std::size_t rows) {
    const std::size_t whole = p_.x.inner == 1 ? p_.inner / kStep * kStep : 0;
    for (std::size_t m = 0; m < rows; ++m) {
      const std::uint16_t* const bits =
          p_.x.bits + std::ptrdiff_t(b) * p_.x.batch + std::ptrdiff_t(row + m) * p_.x.row;
      float* const out = x_.get() + m * stride_;
      kernels_.widen(bits, whole, out);
      for (std::size_t i = whole; i < p_.inner; i += kStep) {
        std::uint16_t step[kStep] = {};
        for (std::size_t k = i; k < std::min(p_.inner, i + kStep); ++k)
          step[k - i] = bits[std::ptrdiff_t(k) * p_.x.inner];
        kernels_.widen(step, kStep, out + i);
      }
    }
  }

  void multiply(std::size_t b, std::size_t row, std::size_t rows, std::size_t column,
                std::size_t columns) {
    std::fill_n(sums_.get(), rows * kColumns, 0.0f);
    for (std::size_t k = 0; k < p_.inner; k += kInner) {
      const std::size_t inner = std::min(p_.inner - k, kInner);
      const std::uint16_t* w = p_.w.bits + std::ptrdiff_t(b) * p_.w.batch +
                               std::ptrdiff_t(column) * p_.w.row + std::ptrdiff_t(k) * p_.w.inner;
      if (packed_) pack(w, columns, inner);
      kernels_.add({x_.get() + k, stride_, packed_ ? packed_.get() : w,
                    packed_ ? std::ptrdiff_t(packed_stride_) : p_.w.row, rows, columns,
                    filled(inner), sums_.get(), kColumns});
    }
    for (std::size_t m = 0; m < rows; ++m) {
      float* const sums = sums_.get() + m * kColumns;
      if (p_.bias)
        for (std::size_t n = 0; n < columns; ++n) sums[n] += wide(p_.bias[column + n]);
      const std::size_t at = (b * p_.rows + row + m) * p_.columns + column;
      if (p_.rounded) kernels_.round(sums, columns, p_.rounded + at);
      else std::copy_n(sums, columns, p_.sums + at);
    }
  }

  // As rows of `w` would lie, zeros behind them, and no power of two apart, which would share lines
  // of the cache. Of columns that follow each other a line at a time.
  void pack(const std::uint16_t* w, std::size_t columns, std::size_t inner) {
    for (std::size_t begin = 0; begin < columns; begin += 32) {
      const std::size_t end = std::min(columns, begin + 32);
      for (std::size_t k = 0; k < inner; k += kSquare) {
        const bool whole = p_.w.row == 1 && k + kSquare <= inner;
        for (std::size_t n = begin; n < end; n += kSquare) {
          const std::uint16_t* const from =
              w + std::ptrdiff_t(n) * p_.w.row + std::ptrdiff_t(k) * p_.w.inner;
          std::uint16_t* const to = packed_.get() + n * packed_stride_ + k;
          if (whole && n + kSquare <= end) {
            turn_square(from, p_.w.inner, to, packed_stride_);
            continue;
          }
          for (std::size_t i = 0; i < std::min(kSquare, end - n); ++i)
            for (std::size_t j = 0; j < std::min(kSquare, inner - k); ++j)
              to[i * packed_stride_ + j] =
                  from[std::ptrdiff_t(i) * p_.w.row + std::ptrdiff_t(j) * p_.w.inner];
        }
      }
      for (std::size_t n = begin; n < end; ++n)
        std::fill_n(packed_.get() + n * packed_stride_ + inner, filled(inner) - inner, 0);
    }
  }

  const Product& p_;
  const Kernels& kernels_;
  const std::size_t stride_;
  std::unique_ptr<float[]> x_, sums_;
  std::size_t packed_stride_ = 0;
  std::unique_ptr<std::uint16_t[]> packed_;  // of `w` that does not lie as kernels read it
};

}  // namespace

void multiply(const Product& product, std::size_t threads) {
  const std::size_t columns = product.batch * product.columns;
  if (!columns || !product.rows) return;
  const std::size_t worth = columns * product.rows * product.inner / kWorthAThread;
  const std::size_t wanted = std::max<std::size_t>(1, std::min(threads, worth));
  const std::size_t each = ((columns + wanted - 1) / wanted + kTiles - 1) / kTiles * kTiles;
  std::vector<Part> parts;
  for (std::size_t first = 0; first < columns; first += each) parts.emplace_back(product);
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    const DefaultEnvironment environment;
    for (std::size_t i; (i = next++) < parts.size();)
      parts[i].run(i * each, std::min(columns, (i + 1) * each));
  };
  std::vector<std::thread> others;
  others.reserve(parts.size());
  while (others.size() + 1 < parts.size()) {
    try {
      others.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // those that began do it all
    }
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace kvzip::bf16
