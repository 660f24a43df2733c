// Round trips and damage for the predictive codec's C++, with models of random numbers, on every
// instruction set of this processor.
#define KVZIP_FUZZ_PRODUCTS
#include "fuzz.hpp"

#include <deque>
#include <limits>
#include <stdexcept>

#include "predictive/block_parts.hpp"
#include "predictive/chain.hpp"

using namespace kvzip::predictive;
using namespace kvzip::fuzz;
using kvzip::NumberFormat;
using kvzip::RopeRounding;
namespace simd = kvzip::simd;

namespace {

std::int64_t between(std::int64_t low, std::int64_t high) {
  return low + std::int64_t(below(std::size_t(high - low + 1)));
}

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
std::int64_t most() {
  return std::numeric_limits<T>::max();
}

Span<std::uint32_t> densities(Arrays& arrays, std::size_t shapes) {
  auto d = arrays.of<std::uint32_t>(shapes * (kCells + 1), 0, 0);
  auto* at = const_cast<std::uint32_t*>(d.data);
  // Cells below 2^20, the last edge at a half.
  constexpr std::uint32_t kStep = kCdf / 2 / kCells;
  for (std::size_t s = 0; s < shapes; ++s, at += kCells + 1) {
    for (std::uint32_t i = 1; i < kCells; ++i) at[i] = i * kStep + std::uint32_t(below(kStep));
    at[kCells] = kCdf / 2;
  }
  return d;
}

// Small ones or all that there are; sometimes as far from 0 as they go, where sums come next to
// what 16 bits hold.
Span<std::int8_t> weights(Arrays& arrays, std::size_t n) {
  const std::int64_t limit = std::min<std::int64_t>(1 << below(8), 127);
  const Span<std::int8_t> w = arrays.of<std::int8_t>(n, -limit, limit);
  if (below(2))
    for (std::size_t i = 0; i < n; ++i)
      const_cast<std::int8_t*>(w.data)[i] = std::int8_t(w.data[i] < 0 ? -limit : limit);
  return w;
}

// Zeros where a channel would look at one of its own group or after it.
void cut_groups(const Span<std::int8_t>& within, const LayerArrays& a, std::size_t keys,
                std::size_t n) {
  const std::size_t blocks = up4(n) / 4;
  auto* const w = const_cast<std::int8_t*>(within.data);
  for (std::size_t r = 0; r < a.regions; ++r)
    for (std::size_t c = 0; c < 4 * blocks; ++c) {
      const std::size_t part = c < keys ? 0 : keys, start = part + (c - part) / a.group * a.group;
      for (std::size_t i = start; i < 4 * blocks; ++i)
        w[(r * blocks * blocks + c / 4 * blocks + i / 4) * 16 + c % 4 * 4 + i % 4] = 0;
    }
}

LayerArrays layer(Arrays& arrays, const std::vector<std::size_t>& widths, std::size_t shapes,
                  bool sane, std::size_t group, std::size_t lanes) {
  LayerArrays a{};
  a.group = group;
  a.lanes = lanes;
  a.k_heads = 1 + below(3);
  a.k_dim = 1 + below(9);
  a.v_heads = 1 + below(2);
  a.v_dim = 1 + below(9);
  a.regions = widths.empty() ? 1 : 1 + below(6);
  const std::size_t pairs = below(a.k_dim / 2 + 1), k = a.k_heads * a.k_dim,
                    n = k + a.v_heads * a.v_dim;
  const std::size_t blocks = up4(n) / 4, all = a.regions * n;
  std::size_t inputs = 0;
  for (std::size_t l = 0; l < widths.size(); ++l)
    if (below(2) || l + 1 == widths.size()) {
      a.inputs.push_back(l);
      inputs += up4(widths[l]);
    }
  a.order = arrays.of<std::int32_t>(n, 0, 0);
  auto* order = const_cast<std::int32_t*>(a.order.data);
  // Pairs in any order, then what is not turned, then values.
  const bool side_by_side = below(2);
  std::vector<std::int32_t> firsts, rest;
  for (std::size_t i = 0; i < k; ++i) {
    const std::size_t d = i % a.k_dim;
    if (d >= 2 * pairs) rest.push_back(std::int32_t(i));
    else if (side_by_side ? d % 2 == 0 : d < pairs) firsts.push_back(std::int32_t(i));
  }
  std::shuffle(firsts.begin(), firsts.end(), random_bits);
  std::shuffle(rest.begin(), rest.end(), random_bits);
  std::int32_t* to = order;
  for (std::int32_t c : firsts) {
    *to++ = c;
    *to++ = c + (side_by_side ? 1 : std::int32_t(pairs));
  }
  to = std::copy(rest.begin(), rest.end(), to);
  for (std::size_t i = k; i < n; ++i) *to++ = std::int32_t(i - k);
  std::shuffle(order + k, order + n, random_bits);
  const std::int64_t wide = sane ? 1 << 20 : most<std::int32_t>();
  a.step = arrays.of<std::uint64_t>(pairs, 0, most<std::int64_t>() - 1);
  a.unit = arrays.of<std::int8_t>(n, sane ? -20 : -120, sane ? -10 : 60);
  a.mean = arrays.of<std::int32_t>(n, -wide, wide);
  a.input_scale = arrays.of<std::int32_t>(n, -wide, wide);
  a.bias = arrays.of<std::int32_t>(all, -wide, wide);
  a.weight = weights(arrays, a.regions * blocks * inputs * 4);
  a.weight_scale = arrays.of<std::int32_t>(all, -wide, wide);
  a.within = weights(arrays, a.regions * blocks * blocks * 16);
  cut_groups(a.within, a, k, n);
  a.within_scale = arrays.of<std::int32_t>(all, -wide, wide);
  a.density = arrays.of<std::uint8_t>(n, 0, std::int64_t(shapes) - 1);
  if (a.regions > 1) {
    a.centre = weights(arrays, up4(a.regions) / 4 * inputs * 4);
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
    // Now and then in the header, and in what comes soon after it.
    const std::size_t most = below(2) ? bytes.size() : std::min<std::size_t>(bytes.size(), 48);
    for (std::size_t n = 1 + below(4); n; --n) bytes[below(most)] = std::uint8_t(below(256));
  }
  return bytes;
}

// A block's header, and what is behind it.
struct Stored {
  explicit Stored(const Bytes& block)
      : first(Bytes(block.begin(), block.begin() + length(block))),
        others(Bytes(block.begin() + length(block), block.end())) {}
  static std::ptrdiff_t length(const Bytes& block) {
    return std::ptrdiff_t(std::min<std::size_t>(block.size(), 16));
  }
  Span<std::uint8_t> header() const { return {first.data.get(), first.size}; }
  Span<std::uint8_t> rest() const { return {others.data.get(), others.size}; }

  Exact first, others;
};

float from_bf16(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
std::uint16_t to_bf16(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// RoPE, [heads][count][dim] of each row. `angles`: [count][2][pairs].
void turn(std::uint16_t* keys, std::size_t heads, std::size_t count, std::size_t dim,
          std::size_t pairs, const float* angles, RopeRounding rounding) {
  const auto product = [&](float a, float b) {
    return rounds_products(rounding) ? from_bf16(to_bf16(a * b)) : a * b;
  };
  const std::size_t step = is_side_by_side(rounding) ? 2 : 1, apart = step == 2 ? 1 : pairs;
  for (std::size_t i = 0; i < heads * count * pairs; ++i) {
    const std::size_t p = i % pairs, token = i / pairs % count;
    std::uint16_t* const at = keys + i / pairs * dim + step * p;
    const float a = from_bf16(at[0]), b = from_bf16(at[apart]);
    const float c = angles[2 * pairs * token + p], s = angles[2 * pairs * token + pairs + p];
    at[0] = to_bf16(product(a, c) - product(b, s));
    at[apart] = to_bf16(product(b, c) + product(a, s));
  }
}

template <typename T>
void once(NumberFormat format) {
  // Damage takes as many numbers as there are paths: the next round begins with its own.
  const std::uint64_t next = random_bits();
  Arrays arrays;
  const std::size_t shapes = 1 + below(3);
  const bool sane = below(2);
  const Span<std::uint32_t> shares = densities(arrays, shapes);
  ProfileModel model(shares, arrays.of<std::int16_t>(4096, -(1 << 14), 1 << 14));
  std::vector<std::size_t> widths;
  std::vector<LayerArrays> layers;
  const std::size_t group = 2 * (1 + below(below(2) ? 4 : kMostLanes)),
                    lanes = 1 + below(group / 2);
  for (std::size_t i = 0, n = 1 + below(4); i < n; ++i) {
    layers.push_back(layer(arrays, widths, shapes, sane, group, lanes));
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
      blocks.push_back({parts.back().get(), std::ptrdiff_t(heads * count * dim),
                        std::ptrdiff_t(count * dim), std::ptrdiff_t(dim), 1});
    }
  // Of some layers pairs may be coded as they were before RoPE, whatever their keys are.
  std::vector<Span<float>> rotations;
  std::vector<RopeRounding> roundings;
  for (const LayerArrays& l : layers) {
    const std::size_t pairs = l.step.size;
    const bool rotated = format.exponent_bits == 8 && pairs && below(4);
    // Cosines and sines of bf16, or with more bits.
    const Part& keys = model.layer(rotations.size() / 2).part[0];
    auto rounding = RopeRounding(rotated ? 1 + below(3) : 0);
    const Span<std::uint32_t> bits = arrays.of<std::uint32_t>(2 * pairs * count, 0, 0x3f800000);
    const Span<float> angles = arrays.of<float>(bits.size, 0, 0);
    auto* const to = const_cast<float*>(angles.data);
    for (std::size_t i = 0; i < angles.size; ++i) {
      float angle;
      std::memcpy(&angle, &bits.data[i], sizeof angle);
      angle = angle < 0x1p-40f ? 0 : below(2) ? -angle : angle;
      to[i] = is_wide(rounding) ? angle : from_bf16(to_bf16(angle));
    }
    if (rotated && keys.side_by_side) rounding = side_by_side(rounding);
    if constexpr (sizeof(T) == 2)
      if (rotated && kind == 2)
        turn(parts[roundings.size()].get(), rows * l.k_heads, count, l.k_dim, pairs, angles.data,
             rounding);
    for (int p = 0; p < 2; ++p) {
      rotations.push_back(p ? Span<float>{} : angles);
      roundings.push_back(p ? RopeRounding::none : rounding);
    }
  }
  // Some parts are coded another way: they are modelled only.
  std::vector<bool> kept;
  for (std::size_t i = 0; i < blocks.size(); ++i) kept.push_back(below(5) != 0);
  kept[below(kept.size())] = true;
  std::vector<Bytes> coded;
  for (simd::Level level : kLevels) {
    simd::set_level(level);
    Chain writer(model, rows, count, position, format, entries);
    Chain reader(model, rows, count, position, format, entries);
    const auto plain = [](const Block<T>& b) {
      return Block<const T>{b.data, b.row_stride, b.head_stride, b.token_stride, b.dim_stride};
    };
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if constexpr (sizeof(T) == 2)
        if (roundings[i] != RopeRounding::none)
          writer.rounding(plain(blocks[i]), rotations[i], i % 4 == 0);
      writer.measure(plain(blocks[i]), nullptr, rotations[i],
                     kept[i] ? roundings[i] : RopeRounding::none);
      if (i % 4 == 0) {
        writer.again();
        writer.measure(plain(blocks[i]), nullptr, rotations[i],
                       kept[i] ? roundings[i] : RopeRounding::none);
      }
      if (kept[i]) writer.keep();
    }
    std::vector<Bytes> made(writer.kept());
    writer.encode([&made](std::size_t part, std::size_t size) {
      made[part].resize(size);
      return made[part].data();
    });
    if (level == kLevels[0]) {
      coded = made;
      for (const Bytes& bytes : made) encoded_bytes.update(bytes.data(), bytes.size());
    }
    check(made == coded, "another path gives other bytes");
    for (std::size_t i = 0, next = 0; i < blocks.size(); ++i) {
      const Block<T>& b = blocks[i];
      if (!kept[i]) {
        reader.measure(plain(b), nullptr, {}, RopeRounding::none);
        continue;
      }
      std::unique_ptr<T[]> out(new T[sizes[i]]());
      const Stored stored(coded[next++]);
      check(reader.decode(stored.header(), stored.rest(),
                          Block<T>{out.get(), b.row_stride, b.head_stride, b.token_stride, 1},
                          rotations[i]),
            "a true stream is refused");
      check(std::equal(out.get(), out.get() + sizes[i], b.data), "other numbers come back");
    }
    const std::size_t first = std::size_t(std::find(kept.begin(), kept.end(), true) - kept.begin());
    for (int again = 0; again < 3; ++again) {
      Chain hurt(model, rows, count, position, format, entries);
      for (std::size_t i = 0; i < first; ++i)
        hurt.measure(plain(blocks[i]), nullptr, {}, RopeRounding::none);
      const Stored stored(damaged(coded[0]));
      std::unique_ptr<T[]> out(new T[sizes[first]]());
      const Block<T>& b = blocks[first];
      try {
        hurt.decode(stored.header(), stored.rest(),
                    Block<T>{out.get(), b.row_stride, b.head_stride, b.token_stride, 1},
                    rotations[first]);
      } catch (const std::invalid_argument&) {  // a kind that goes with bf16 keys alone
      }
    }
  }
  random_bits.seed(next);
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    once<std::uint16_t>({8, 7});
    once<std::uint16_t>({5, 10});
    once<std::uint8_t>({4, 3});
    once<std::uint8_t>({5, 2});
  });
}
