#include "predictive/kernels.hpp"

#include "native/simd.hpp"

#include <algorithm>
#include <cstring>

namespace kvzip::predictive {
namespace {

// sums[t] = w * x[t] for n rows of x. One source for all instruction sets: sums of integers are the
// same whatever their order.
__attribute__((always_inline)) inline void dots_body(const std::uint8_t* x, std::size_t stride,
                                                     std::size_t n, const std::int8_t* w,
                                                     std::size_t length, std::int32_t* sums) {
  std::size_t t = 0;
  for (; t + 4 <= n; t += 4) {
    const std::uint8_t *x0 = x + t * stride, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
    std::int32_t a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    for (std::size_t i = 0; i < length; ++i) {
      a0 += x0[i] * w[i];
      a1 += x1[i] * w[i];
      a2 += x2[i] * w[i];
      a3 += x3[i] * w[i];
    }
    sums[t] = a0;
    sums[t + 1] = a1;
    sums[t + 2] = a2;
    sums[t + 3] = a3;
  }
  for (; t < n; ++t) {
    std::int32_t a = 0;
    for (std::size_t i = 0; i < length; ++i) a += x[t * stride + i] * w[i];
    sums[t] = a;
  }
}

using Dots = void (*)(const std::uint8_t*, std::size_t, std::size_t, const std::int8_t*, std::size_t,
                      std::int32_t*);

void dots_scalar(const std::uint8_t* x, std::size_t stride, std::size_t n, const std::int8_t* w,
                 std::size_t length, std::int32_t* sums) {
  dots_body(x, stride, n, w, length, sums);
}

#ifdef KVZIP_X86
__attribute__((target("avx2"))) void dots_avx2(const std::uint8_t* x, std::size_t stride,
                                               std::size_t n, const std::int8_t* w,
                                               std::size_t length, std::int32_t* sums) {
  dots_body(x, stride, n, w, length, sums);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,prefer-vector-width=512"))) void
dots_avx512(const std::uint8_t* x, std::size_t stride, std::size_t n, const std::int8_t* w,
            std::size_t length, std::int32_t* sums) {
  dots_body(x, stride, n, w, length, sums);
}
#endif

Dots best_dots() {
#ifdef KVZIP_X86
  if (simd::level() >= simd::Level::avx512 && __builtin_cpu_supports("avx512vnni"))
    return dots_avx512;
  if (simd::level() >= simd::Level::avx2) return dots_avx2;
#endif
  return dots_scalar;
}

inline std::int32_t clamp(std::int64_t v, std::int32_t limit) {
  return std::int32_t(std::min<std::int64_t>(std::max<std::int64_t>(v, -limit), limit));
}

// v * 2^-shift, to the nearest, halves upwards.
inline std::int64_t scaled(std::int64_t v, int shift) {
  return (v + (std::int64_t(1) << (shift - 1))) >> shift;
}

// --- numbers in their order ----------------------------------------------------------------

// The numbers of a format, counted from the lowest, as fixed-point values of one channel.
struct Grid {
  std::uint32_t half;  // numbers of each sign
  int mantissa_bits, low;  // `low`: exponent of the smallest subnormal, in units

  Grid(Form form, int unit)
      : half(1u << (form.bits() - 1)),
        mantissa_bits(form.mantissa_bits),
        low(2 - (1 << (form.exponent_bits - 1)) - form.mantissa_bits - unit) {}

  // Infinities and NaNs go on where the finite numbers end, and are cut off with them.
  std::int32_t magnitude(std::uint32_t m) const {
    const std::uint32_t e = m >> mantissa_bits;
    const std::uint32_t f =
        (m & ((1u << mantissa_bits) - 1)) | std::uint32_t(e != 0) << mantissa_bits;
    const int shift = low + int(e ? e - 1 : 0);
    if (shift >= 0) {
      const bool beyond = shift > kClampBits || f >> (kClampBits - shift);
      return beyond ? (f ? kClamp : 0) : std::int32_t(f << shift);
    }
    if (shift < -24) return 0;
    return std::int32_t((f + (1u << (-shift - 1))) >> -shift);
  }
  std::int32_t value(std::uint32_t k) const {
    return k >= half ? magnitude(k - half) : -magnitude(half - 1 - k);
  }
  // Twice the boundary between number k-1 and number k.
  std::int64_t edge2(std::uint32_t k) const { return std::int64_t(value(k - 1)) + value(k); }

  // About the number next to a value; only where a search begins, so it may be off.
  std::uint32_t near(std::int64_t v) const {
    const std::uint64_t a = std::uint64_t(v < 0 ? -v : v);
    std::uint32_t m = 0;
    if (a) {
      const int top = 63 - __builtin_clzll(a);
      const int e = top - low - mantissa_bits + 1;  // biased exponent if it is above 0
      if (e <= 0) {
        m = low >= 0 ? std::uint32_t(a >> std::min(low, 63)) : std::uint32_t(a << std::min(-low, 30));
      } else {
        const std::uint64_t f = top >= mantissa_bits ? a >> (top - mantissa_bits)
                                                     : a << (mantissa_bits - top);
        m = (std::uint32_t(e) << mantissa_bits) + std::uint32_t(f) - (1u << mantissa_bits);
      }
      m = std::min(m, half - 1);
    }
    return v < 0 ? half - 1 - m : half + m;
  }
};

inline std::uint32_t order_of(std::uint32_t bits, std::uint32_t half) {
  return bits & half ? 2 * half - 1 - bits : bits + half;
}
inline std::uint32_t bits_of(std::uint32_t k, std::uint32_t half) {
  return k >= half ? k - half : 2 * half - 1 - k;
}

// --- the density ---------------------------------------------------------------------------

// Where |z| lies in a density's table: cells of 1/16 up to 2, then 16 an octave, up to 2^12.
struct Place {
  int cell;
  std::uint32_t rest;
  int width;  // log2
};
inline Place place_of(std::uint32_t a) {
  constexpr int kLinear = kZBits - 4;
  if (a < 2u << kZBits) return {int(a >> kLinear), a & ((1u << kLinear) - 1), kLinear};
  const int e = 31 - __builtin_clz(a);
  const int width = e - 4;
  return {32 + (e - kZBits - 1) * 16 + int(a >> width & 15), a & ((1u << width) - 1), width};
}

// The cumulative distribution of one number: where it is expected, how widely, in which shape.
struct Density {
  const std::uint32_t* table;
  std::int64_t centre2;   // twice the prediction
  std::int64_t inverse;   // z = deviation2 * inverse * 2^-20
  std::int64_t spread;    // the scale in 2^-4 units
  std::uint32_t numbers;

  std::uint32_t z_of(std::int64_t deviation2, bool* negative) const {
    constexpr std::int64_t kFar = 1 << 26;
    const std::int64_t near = std::min(std::max(deviation2, -kFar), kFar);
    const std::int64_t z = near * inverse >> 20;
    *negative = z < 0;
    return std::uint32_t(std::min<std::int64_t>(z < 0 ? -z : z, (1 << (kZBits + 12)) - 1));
  }
  // Share of 2^24 below number k: each number has at least 1, the rest follows the density.
  std::uint32_t below(const Grid& grid, std::uint32_t k) const {
    if (k == 0) return 0;
    if (k == numbers) return kCdf;
    bool negative;
    const Place p = place_of(z_of(grid.edge2(k) - centre2, &negative));
    const std::uint32_t g = table[p.cell] + std::uint32_t(
        std::uint64_t(table[p.cell + 1] - table[p.cell]) * p.rest >> p.width);
    const std::uint32_t c = negative ? kCdf / 2 - g : kCdf / 2 + g;
    return std::uint32_t(std::uint64_t(c) * (kCdf - numbers) >> kCdfBits) + k;
  }
  // The number whose interval holds `target`: guessed from the inverse, then made sure of.
  std::uint32_t find(const Grid& grid, std::uint32_t target, std::uint32_t* start,
                     std::uint32_t* end) const {
    const std::uint32_t middle = grid.near(centre2 >> 1);
    const std::int64_t c = std::min<std::int64_t>(
        std::max<std::int64_t>(std::int64_t(target) - middle, 0), kCdf - numbers);
    const std::int64_t full = c + (c * numbers >> kCdfBits);
    const bool negative = full < kCdf / 2;
    const auto g = std::uint32_t(negative ? kCdf / 2 - full : full - kCdf / 2);
    int cell = 0;
    for (int step = 128; step; step >>= 1)
      if (cell + step < kCells && table[cell + step] <= g) cell += step;
    const int width = kZBits - 4 + (cell < 32 ? 0 : 1 + (cell - 32) / 16);
    const std::uint32_t from = cell < 32 ? std::uint32_t(cell) << width
                                         : std::uint32_t(16 + (cell & 15)) << width;
    const std::uint32_t rise = table[cell + 1] - table[cell];
    const std::uint32_t a = from + (rise ? std::uint32_t((std::uint64_t(std::min(g - table[cell], rise)) << width) / rise) : 0);
    const std::int64_t deviation = std::int64_t(a) * spread >> (kZBits + 4);
    std::uint32_t low = grid.near((centre2 >> 1) + (negative ? -deviation : deviation));
    std::uint32_t at = below(grid, low);
    std::uint32_t high, above;
    if (at > target) {
      std::uint32_t step = 1;
      do {
        high = low;
        above = at;
        low = low > step ? low - step : 0;
        at = below(grid, low);
        step *= 2;
      } while (at > target);
    } else {
      std::uint32_t step = 1;
      high = low + 1;
      while ((above = below(grid, high)) <= target) {
        low = high;
        at = above;
        high = numbers - high > step ? high + step : numbers;
        step *= 2;
      }
    }
    while (high - low > 1) {
      const std::uint32_t mid = low + (high - low) / 2;
      const std::uint32_t b = below(grid, mid);
      if (b > target) {
        high = mid;
        above = b;
      } else {
        low = mid;
        at = b;
      }
    }
    *start = at;
    *end = above;
    return low;
  }
};

// --- coders: what becomes of a number and its interval ---------------------------------------

// The number is known; its interval is noted.
template <typename T>
struct Recorder {
  Interval* at;
  std::uint32_t* counts;
  std::uint32_t half;

  std::uint32_t operator()(const Grid& grid, const Density& density, std::size_t token, T* number) {
    const std::uint32_t k = order_of(*number, half);
    const std::uint32_t start = density.below(grid, k);
    *at++ = {start, density.below(grid, k + 1) - start, std::uint32_t(token % kLanes)};
    return k;
  }
  void note(std::size_t channel, std::uint32_t z) {
    if (counts) ++counts[channel * kCells + std::size_t(place_of(z).cell)];
  }
  bool good() const { return true; }
};

// The number is read.
template <typename T>
struct Reader {
  std::uint64_t state[kLanes];
  const std::uint8_t *word, *end;
  std::uint32_t half;
  bool ran_out = false;

  std::uint32_t operator()(const Grid& grid, const Density& density, std::size_t token, T* number) {
    std::uint64_t& x = state[token % kLanes];
    const std::uint32_t target = std::uint32_t(x) & (kCdf - 1);
    std::uint32_t from, to;
    const std::uint32_t k = density.find(grid, target, &from, &to);
    x = std::uint64_t(to - from) * (x >> kCdfBits) + target - from;
    if (x < kLow) {
      std::uint32_t next = 0;
      if (word == end) {
        ran_out = true;
      } else {
        std::memcpy(&next, word, 4);
        word += 4;
      }
      x = x << 32 | next;
    }
    *number = T(bits_of(k, half));
    return k;
  }
  void note(std::size_t, std::uint32_t) {}
  bool good() const { return !ran_out; }
};

// --- one part of a layer --------------------------------------------------------------------

template <typename T, typename Coder>
bool run(const Model& m, const Layer& layer, int which, Form form, const Tokens& tokens,
         const Block<T>& block, Coder& coder) {
  const Part& part = layer.part[which];
  const std::size_t channels = part.heads * part.dim, pairs = part.heads * part.pairs;
  const std::size_t total = tokens.rows * tokens.count;
  const std::uint32_t numbers = 1u << form.bits();
  const Dots dots = best_dots();
  for (std::size_t t0 = 0; t0 < total; t0 += kTile) {
    const std::size_t n = std::min<std::size_t>(kTile, total - t0);
    std::int32_t deviation[kTile] = {};
    std::size_t counted = 0;
    std::uint8_t* const residual = tokens.residual + t0 * layer.row;

    T* numbers_of[kTile];  // of each token, as if of channel 0
    std::uint64_t position[kTile];
    for (std::size_t t = 0; t < n; ++t) {
      const std::size_t row = (t0 + t) / tokens.count, token = (t0 + t) % tokens.count;
      numbers_of[t] = block.data + std::ptrdiff_t(row) * block.row_stride +
                      std::ptrdiff_t(token) * block.token_stride;
      position[t] = tokens.position + token;
    }
    const auto offset = [&](std::size_t place) {
      const auto c = std::size_t(part.order[place]);
      return std::ptrdiff_t(c / part.dim) * block.head_stride +
             std::ptrdiff_t(c % part.dim) * block.dim_stride;
    };
    const auto density = [&](std::size_t t, std::size_t at, std::int64_t centre, std::int32_t scale) {
      const std::int64_t spread = std::max<std::int64_t>(
          std::int64_t(scale) * tokens.energy[t0 + t] >> 12, 2);
      return Density{m.densities + layer.density[at] * (kCells + 1), 2 * centre,
                     (std::int64_t(1) << (kZBits + 23)) / spread, spread, numbers};
    };
    const auto code = [&](const Grid& grid, const Density& d, std::size_t t, std::size_t place,
                          std::ptrdiff_t at) {
      const std::int32_t v = grid.value(coder(grid, d, t0 + t, numbers_of[t] + at));
      bool negative;
      const std::uint32_t z = d.z_of(2 * std::int64_t(v) - d.centre2, &negative);
      coder.note(tokens.known[t0 + t] * channels + place, z);
      deviation[t] += std::int32_t(std::min(z >> (kZBits - 8), 2048u));
      return v;
    };
    const auto know = [&](std::size_t t, std::size_t at, std::int32_t v) {
      tokens.value[(t0 + t) * layer.width + at] = v;
      const std::int64_t r = std::int64_t(v) - tokens.base[(t0 + t) * layer.width + at];
      residual[t * layer.row + at] = std::uint8_t(128 + clamp(scaled(r, kResidualShift), 127));
    };
    const auto centre = [&](std::size_t t, std::size_t at, std::int32_t sum) {
      const std::int64_t s = std::int64_t(sum) - layer.within_sum[at];
      return clamp(tokens.base[(t0 + t) * layer.width + at] + scaled(s * layer.within_scale[at], 20),
                   kClamp);
    };

    for (std::size_t place = 0; place < channels;) {
      const std::size_t at = part.first + place, length = (at + 63) / 64 * 64;
      std::int32_t sums[2][kTile];
      dots(residual, layer.row, n, layer.within + at * layer.row, length, sums[0]);
      const Grid grid(form, layer.unit[at]);
      const std::ptrdiff_t one = offset(place);
      if (place % part.dim < 2 * part.pairs) {
        dots(residual, layer.row, n, layer.within + (at + 1) * layer.row, length, sums[1]);
        const std::size_t pair = place % part.dim / 2, head = place / part.dim;
        const std::ptrdiff_t two = offset(place + 1);
        for (std::size_t t = 0; t < n; ++t) {
          const std::uint64_t phase = part.step[pair] * position[t];
          const auto turn = std::size_t((phase + (std::uint64_t(1) << 51)) >> 52);
          const std::int64_t sin = m.sine[turn], cos = m.sine[(turn + 1024) & 4095];
          const std::size_t angle =
              ((tokens.known[t0 + t] * pairs + head * part.pairs + pair) * kAngles + turn / 128);
          const std::int64_t a = centre(t, at, sums[0][t]), b = centre(t, at + 1, sums[1][t]);
          const std::int64_t p = scaled(a * cos - b * sin, 14), q = scaled(b * cos + a * sin, 14);
          const std::int32_t x = code(grid, density(t, at, p, part.pair_scale[2 * angle]), t, place, one);
          const std::int64_t q1 = q + scaled(std::int64_t(part.pair_slope[angle]) * (x - p), 12);
          const std::int32_t y = code(
              grid, density(t, at + 1, clamp(q1, kClamp), part.pair_scale[2 * angle + 1]), t, place + 1,
              two);
          know(t, at, clamp(scaled(x * cos + y * sin, 14), kClamp));
          know(t, at + 1, clamp(scaled(y * cos - x * sin, 14), kClamp));
        }
        place += 2;
        counted += 2;
      } else {
        for (std::size_t t = 0; t < n; ++t) {
          const std::size_t scale = tokens.known[t0 + t] * channels + place;
          know(t, at, code(grid, density(t, at, centre(t, at, sums[0][t]), part.scale[scale]), t, place, one));
        }
        place += 1;
        counted += 1;
      }
      if (counted >= kGroup) {
        for (std::size_t t = 0; t < n; ++t) {
          std::int32_t& e = tokens.energy[t0 + t];
          const std::int64_t off = deviation[t] / std::int32_t(counted) - 256;
          e = std::int32_t(std::min<std::int64_t>(std::max<std::int64_t>(e + (e * off >> 11), 256), 1 << 16));
          deviation[t] = 0;
        }
        counted = 0;
      }
      if (!coder.good()) return false;
    }
  }
  return true;
}

}  // namespace

void predict(const Layer& layer, const std::uint8_t* input, std::size_t tokens, std::int32_t* base) {
  const Dots dots = best_dots();
  for (std::size_t t0 = 0; t0 < tokens; t0 += kTile) {
    const std::size_t n = std::min<std::size_t>(kTile, tokens - t0);
    for (std::size_t j = 0; j < layer.width; ++j) {
      std::int32_t sums[kTile];
      dots(input + t0 * layer.inputs, layer.inputs, n, layer.weight + j * layer.inputs, layer.inputs, sums);
      for (std::size_t t = 0; t < n; ++t) {
        const std::int64_t s = std::int64_t(sums[t]) - layer.weight_sum[j];
        base[(t0 + t) * layer.width + j] =
            clamp(layer.bias[j] + scaled(s * layer.weight_scale[j], 20), kClamp);
      }
    }
  }
}

template <typename T>
void model(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
           const Block<const T>& block, Interval* intervals, std::uint32_t* counts) {
  // The coder only reads through the pointer.
  const Block<T> numbers{const_cast<T*>(block.data), block.row_stride, block.head_stride,
                         block.token_stride, block.dim_stride};
  Recorder<T> coder{intervals, counts, 1u << (form.bits() - 1)};
  run(m, layer, part, form, tokens, numbers, coder);
}

template <typename T>
bool decode(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
            const Block<T>& block, const std::uint8_t* states, const std::uint8_t* words,
            std::size_t word_count) {
  Reader<T> coder{};
  std::memcpy(coder.state, states, sizeof coder.state);
  coder.word = words;
  coder.end = words + 4 * word_count;
  coder.half = 1u << (form.bits() - 1);
  for (std::uint64_t x : coder.state)
    if (x < kLow || x >> 63) return false;
  if (!run(m, layer, part, form, tokens, block, coder) || coder.word != coder.end) return false;
  for (std::uint64_t x : coder.state)
    if (x != kLow) return false;
  return true;
}

std::size_t encode(const Interval* intervals, std::size_t n, std::uint32_t* words_end,
                   std::uint64_t* states) {
  std::uint32_t* word = words_end;
  std::fill(states, states + kLanes, kLow);
  for (std::size_t i = n; i-- > 0;) {
    const Interval& in = intervals[i];
    std::uint64_t& x = states[in.lane];
    if (x >= std::uint64_t(in.size) << 39) {
      *--word = std::uint32_t(x);
      x >>= 32;
    }
    x = (x / in.size << kCdfBits) + x % in.size + in.start;
  }
  return std::size_t(words_end - word);
}

void quantise(const Layer& layer, const std::int32_t* value, std::size_t tokens, std::uint8_t* out,
              std::size_t stride) {
  for (std::size_t t = 0; t < tokens; ++t)
    for (std::size_t c = 0; c < layer.width; ++c) {
      const std::int64_t v = std::int64_t(value[t * layer.width + c]) - layer.mean[c];
      out[t * stride + c] = std::uint8_t(128 + clamp(scaled(v * layer.input_scale[c], kInputShift), 127));
    }
}

#define KVZIP_INSTANTIATE(T)                                                                       \
  template void model(const Model&, const Layer&, int, Form, const Tokens&, const Block<const T>&, \
                      Interval*, std::uint32_t*);                                                                \
  template bool decode(const Model&, const Layer&, int, Form, const Tokens&, const Block<T>&,      \
                       const std::uint8_t*, const std::uint8_t*, std::size_t);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::predictive
