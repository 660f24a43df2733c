// Round trips and damage for the predictive codec's C++, with models of random numbers, on every
// instruction set of this processor; built with AddressSanitizer and UBSan by test_sanitizers.py.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "native/simd.hpp"
#include "predictive/chain.hpp"

using namespace kvzip::predictive;
namespace simd = kvzip::simd;
using Bytes = std::vector<std::uint8_t>;

namespace {

std::mt19937_64 random_bits;
std::size_t below(std::size_t n) { return random_bits() % n; }
std::int64_t between(std::int64_t low, std::int64_t high) { return low + std::int64_t(below(std::size_t(high - low + 1))); }

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  std::exit(1);
}

std::vector<simd::Level> levels() {
  std::vector<simd::Level> found;
  for (simd::Level level : {simd::Level::scalar, simd::Level::avx2, simd::Level::avx512})
    if (simd::set_level(level)) found.push_back(level);
  return found;
}
const std::vector<simd::Level> kLevels = levels();

// Arrays on the heap and of the exact size, so that a byte too far is seen.
struct Arrays {
  template <typename T>
  Span<T> of(std::size_t n, std::int64_t low, std::int64_t high) {
    auto data = std::shared_ptr<T[]>(new T[n]);
    for (std::size_t i = 0; i < n; ++i) data[i] = T(between(low, high));
    kept.push_back(data);
    return {data.get(), n};
  }
  std::deque<std::shared_ptr<void>> kept;
};

template <typename T>
std::int64_t least() { return std::numeric_limits<T>::min(); }
template <typename T>
std::int64_t most() { return std::numeric_limits<T>::max(); }

Span<std::uint32_t> densities(Arrays& arrays, std::size_t shapes) {
  auto d = arrays.of<std::uint32_t>(shapes * (kCells + 1), 0, 0);
  auto* at = const_cast<std::uint32_t*>(d.data);
  for (std::size_t s = 0; s < shapes; ++s, at += kCells + 1) {
    for (int i = 1; i < kCells; ++i) at[i] = std::uint32_t(below(1 << 20)) * 16 / 4;
    std::sort(at, at + kCells);
    // Cells below 2^20, the last edge at a half.
    for (int i = 0; i <= kCells; ++i) at[i] = std::uint32_t(i) * ((kCdf / 2) / kCells) + at[i] % ((kCdf / 2) / kCells);
    at[0] = 0;
    at[kCells] = kCdf / 2;
  }
  return d;
}

LayerArrays layer(Arrays& arrays, const std::vector<std::size_t>& widths, std::size_t shapes, bool sane) {
  LayerArrays a{};
  a.k_heads = 1 + below(3);
  a.k_dim = 1 + below(9);
  a.v_heads = 1 + below(2);
  a.v_dim = 1 + below(9);
  a.regions = widths.empty() ? 1 : 1 + below(6);
  const std::size_t pairs = below(a.k_dim / 2 + 1), k = a.k_heads * a.k_dim, n = k + a.v_heads * a.v_dim;
  const std::size_t blocks = up4(n) / 4, all = a.regions * n;
  std::size_t inputs = 0;
  for (std::size_t l = 0; l < widths.size(); ++l)
    if (below(2) || l + 1 == widths.size()) {
      a.inputs.push_back(l);
      inputs += up4(widths[l]);
    }
  a.order = arrays.of<std::int32_t>(n, 0, 0);
  auto* order = const_cast<std::int32_t*>(a.order.data);
  for (std::size_t i = 0; i < n; ++i) order[i] = std::int32_t(i < k ? i : i - k);
  std::shuffle(order, order + k, random_bits);
  std::shuffle(order + k, order + n, random_bits);
  const std::int64_t wide = sane ? 1 << 20 : most<std::int32_t>();
  a.step = arrays.of<std::uint64_t>(pairs, 0, most<std::int64_t>() - 1);
  a.unit = arrays.of<std::int8_t>(n, sane ? -20 : -128, sane ? -10 : 127);
  a.mean = arrays.of<std::int32_t>(n, -wide, wide);
  a.input_scale = arrays.of<std::int32_t>(n, -wide, wide);
  a.bias = arrays.of<std::int32_t>(all, -wide, wide);
  a.weight = arrays.of<std::int8_t>(a.regions * blocks * inputs * 4, -127, 127);
  a.weight_scale = arrays.of<std::int32_t>(all, -wide, wide);
  a.within = arrays.of<std::int8_t>(a.regions * blocks * blocks * 16, -127, 127);
  a.within_scale = arrays.of<std::int32_t>(all, -wide, wide);
  a.density = arrays.of<std::uint8_t>(n, 0, std::int64_t(shapes) - 1);
  if (a.regions > 1) {
    a.centre = arrays.of<std::int8_t>(up4(a.regions) / 4 * inputs * 4, -127, 127);
    a.centre_bias = arrays.of<std::int32_t>(a.regions, -(1 << 30), 1 << 30);
  }
  a.has_table = below(2);
  const std::size_t rows = below(5);
  if (a.has_table && below(2)) a.table16 = arrays.of<std::int16_t>(rows * n, -32768, 32767);
  else if (a.has_table) a.table8 = arrays.of<std::int8_t>(rows * n, -128, 127);
  const std::size_t classes = a.regions * (a.has_table ? 2 : 1);
  const std::int64_t low = sane ? 1 << 12 : 1, high = sane ? 1 << 16 : 1 << 26;
  a.inverse = arrays.of<std::int32_t>(classes * n, low, high);
  a.pair_inverse = arrays.of<std::int32_t>(classes * a.k_heads * pairs * 2 * kAngles, low, high);
  a.pair_slope = arrays.of<std::int32_t>(classes * a.k_heads * pairs * kAngles, -wide, wide);
  return a;
}

Bytes damaged(Bytes bytes) {
  if (below(3) == 0) {
    bytes.resize(below(bytes.size() + 1));
  } else {
    for (std::size_t n = 1 + below(4); n; --n) bytes[below(bytes.size())] = std::uint8_t(below(256));
  }
  return bytes;
}

// Of all bytes written so far (FNV-1a), to be compared between processors.
std::uint64_t digest = 14695981039346656037ull;

template <typename T>
void once(Form form, std::uint64_t seed) {
  random_bits.seed(seed);
  Arrays arrays;
  const std::size_t shapes = 1 + below(3);
  const bool sane = below(2);
  const Span<std::uint32_t> shares = densities(arrays, shapes);
  ProfileModel model(shares, arrays.of<std::int16_t>(4096, -(1 << 14), 1 << 14));
  std::vector<std::size_t> widths;
  std::vector<LayerArrays> layers;
  for (std::size_t i = 0, n = 1 + below(4); i < n; ++i) {
    layers.push_back(layer(arrays, widths, shapes, sane));
    widths.push_back(layers[i].k_heads * layers[i].k_dim + layers[i].v_heads * layers[i].v_dim);
    model.add_layer(layers[i]);
  }
  const std::size_t rows = 1 + below(2), count = 1 + below(150), position = below(1 << 20);
  const Span<std::int32_t> entries = arrays.of<std::int32_t>(rows * count, -1, 6);

  std::vector<std::unique_ptr<T[]>> parts;
  std::vector<Block<T>> blocks;
  std::vector<std::size_t> sizes;
  const std::size_t kind = below(3);
  for (const LayerArrays& l : layers)
    for (int p = 0; p < 2; ++p) {
      const std::size_t heads = p ? l.v_heads : l.k_heads, dim = p ? l.v_dim : l.k_dim;
      const std::size_t n = rows * heads * count * dim;
      sizes.push_back(n);
      parts.emplace_back(new T[n]);
      for (std::size_t i = 0; i < n; ++i)
        parts.back()[i] = kind == 0 ? T(random_bits()) : kind == 1 ? T(0) : T(0x3f80 + below(64));
      blocks.push_back({parts.back().get(), std::ptrdiff_t(heads * count * dim), std::ptrdiff_t(count * dim),
                        std::ptrdiff_t(dim), 1});
    }
  std::vector<Bytes> coded;
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    Chain writer(model, rows, count, position, form, entries);
    Chain reader(model, rows, count, position, form, entries);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const Block<T>& b = blocks[i];
      const Bytes bytes = writer.encode(Block<const T>{b.data, b.row_stride, b.head_stride, b.token_stride, b.dim_stride});
      if (level == kLevels[0]) {
        coded.push_back(bytes);
        for (std::uint8_t byte : bytes) digest = (digest ^ byte) * 1099511628211ull;
      }
      check(bytes == coded[i], "another path gives other bytes");
      std::unique_ptr<T[]> out(new T[sizes[i]]());
      std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[bytes.size()]);
      std::copy(bytes.begin(), bytes.end(), exact.get());
      check(reader.decode(Span<std::uint8_t>{exact.get(), bytes.size()},
                          Block<T>{out.get(), b.row_stride, b.head_stride, b.token_stride, 1}),
            "a true stream is refused");
      check(std::equal(out.get(), out.get() + sizes[i], b.data), "other numbers come back");
    }
    for (int again = 0; again < 3; ++again) {
      Chain hurt(model, rows, count, position, form, entries);
      const Bytes bytes = damaged(coded[0]);
      std::unique_ptr<T[]> out(new T[sizes[0]]());
      std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[bytes.size()]);
      std::copy(bytes.begin(), bytes.end(), exact.get());
      const Block<T>& b = blocks[0];
      hurt.decode(Span<std::uint8_t>{exact.get(), bytes.size()},
                  Block<T>{out.get(), b.row_stride, b.head_stride, b.token_stride, 1});
    }
  }
}

}  // namespace

// fuzz_predictive SECONDS SEED, or fuzz_predictive --rounds N SEED, which also prints the digest.
int main(int argc, char** argv) {
  const bool counted = argc > 2 && !std::strcmp(argv[1], "--rounds");
  const double limit = argc > 1 + counted ? std::atof(argv[1 + counted]) : 2;
  std::uint64_t seed = argc > 2 + counted ? std::strtoull(argv[2 + counted], nullptr, 10) : 1;
  const auto began = std::chrono::steady_clock::now();
  const auto passed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  };
  int rounds = 0;
  for (; (counted ? double(rounds) : passed()) < limit; ++rounds) {
    once<std::uint16_t>({8, 7}, seed++);
    once<std::uint16_t>({5, 10}, seed++);
    once<std::uint8_t>({4, 3}, seed++);
    once<std::uint8_t>({5, 2}, seed++);
  }
  std::printf("%d rounds, paths:", rounds);
  for (simd::Level level : kLevels) std::printf(" %s", simd::name_of(level));
  std::printf("\n");
  if (counted) std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}
