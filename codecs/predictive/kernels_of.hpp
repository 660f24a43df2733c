// The kernels, written once over vectors of W numbers of 32 bits; `Isa` has the vectors and the few
// operations that differ between instruction sets. Signed numbers wrap (-fwrapv).
#pragma once

#include <algorithm>
#include <cstring>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

// What takes rANS states on once their numbers are known: one after the other, without a branch.
template <int W, class U>
const std::uint8_t* advance_each(std::uint64_t* x, U size, U rest, const std::uint8_t* word) {
  for (int i = 0; i < W; ++i) {
    const std::uint64_t y = std::uint64_t(size[i]) * (x[i] >> kCdfBits) + rest[i];
    std::uint32_t next;
    std::memcpy(&next, word, 4);
    const std::uint64_t low = y < kLow;
    x[i] = y << (32 * low) | (next & (0 - low));
    word += 4 * low;
  }
  return word;
}

template <class Isa>
struct Of {
  using I = typename Isa::I;
  using F = typename Isa::F;
  static constexpr int W = Isa::W;
  static_assert(kLanes % W == 0 && kTile % kLanes == 0);

  static I load(const void* p) {
    I v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, I v) { std::memcpy(p, &v, sizeof v); }
  static I all(std::int32_t v) { return I{} + v; }
  static I least(I a, I b) { return a < b ? a : b; }
  static I most(I a, I b) { return a > b ? a : b; }
  static I clamp(I v, std::int32_t limit) { return most(least(v, all(limit)), all(-limit)); }
  static I shift_right(I v, I by) { return (I)((typename Isa::U)v >> (typename Isa::U)by); }
  static F as_float(I v) { return (F)v; }
  static I as_bits(F v) { return (I)v; }
  static F to_float(I v) { return __builtin_convertvector(v, F); }
  static I to_int(F v) { return __builtin_convertvector(v, I); }
  static bool any(I mask) { return Isa::any(mask); }
  static I lanes() {
    I v;
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
  }

  // Numbers of a format in their order, as fixed-point values of one channel.
  struct Grid {
    std::int32_t half;       // numbers of each sign
    int mantissa_bits, low;  // `low`: exponent of the smallest subnormal, in units
    int exponent_bias;
    float unit;

    Grid(Form form, int unit_exponent)
        : half(1 << (form.bits() - 1)),
          mantissa_bits(form.mantissa_bits),
          low(2 - (1 << (form.exponent_bits - 1)) - form.mantissa_bits - unit_exponent),
          exponent_bias((1 << (form.exponent_bits - 1)) - 1),
          unit(scale(unit_exponent)) {}

    static float scale(int exponent) {
      const std::int32_t bits = (std::min(std::max(exponent, -126), 127) + 127) << 23;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    }
    // Infinities and NaNs go on where the finite numbers end, and are cut off with them.
    I value(I k) const {
      const I s = k - half, sign = s >> 31, m = s ^ sign;
      const I e = m >> mantissa_bits;
      const I f = (m & ((1 << mantissa_bits) - 1)) | ((e != 0) & (1 << mantissa_bits));
      const I shift = most(e, all(1)) - 1 + low;
      const I left = most(least(shift, all(28)), all(0));
      const I right = most(least(-shift, all(25)), all(1));
      I v = f << left;
      v = (f >> (28 - left)) != 0 ? all(kClamp) : v;
      v = (shift > 28) & (f != 0) ? all(kClamp) : v;
      v = shift < 0 ? (f + (all(1) << (right - 1))) >> right : v;
      return (v ^ sign) - sign;
    }
    // About the number next to a value; only where a search begins, so it may be off.
    I near(F v) const {
      const I bits = as_bits(v * unit) & 0x7fffffff;
      const int spare = 23 - mantissa_bits;
      I m = (bits - ((127 - exponent_bias) << 23) + (1 << (spare - 1))) >> spare;
      if (exponent_bias != 127) {  // subnormals are no float32's
        const F x = as_float(bits) * scale(exponent_bias - 1 + mantissa_bits) + 0.5f;
        m = m < (1 << mantissa_bits) ? to_int(x) : m;
      }
      m = most(least(m, all(half - 1)), all(0));
      const I sign = as_bits(v) >> 31;
      return half + (m ^ sign);
    }
  };

  // How numbers of one channel are spread about where they are expected.
  struct Density {
    Grid grid;
    typename Isa::Table table;
    typename Isa::Search search_from;
    std::int32_t half;      // Densities::half
    std::int32_t numbers;

    Density(const Densities& d, std::size_t shape, Form form, int unit)
        : grid(form, unit),
          table(d, shape),
          search_from(d, shape),
          half(d.half),
          numbers(1 << form.bits()) {}

    static constexpr std::int32_t kFarthest = (1 << (kZBits + 7)) - (1 << (kZBits - 1)) - 1;
    static constexpr int kFirst = (127 + kZBits - 1) << 3;  // exponent and top bits of cell 0

    static I z_of(I d, I m) {
      const I a = (d ^ d >> 31) - (d >> 31);
      return Isa::z(least(a, all(1 << 27)), m, kFarthest);
    }
    // Exact: a float32 holds z + 2^13, which is below 2^21.
    static I placed(I z) { return as_bits(to_float(z + (1 << (kZBits - 1)))); }
    static I cell_of(I z) { return (placed(z) >> 20) - kFirst; }

    // Share below the boundary that lies d/2 from the centre, less the number's own place.
    I share(I d, I z) const {
      const I bits = placed(z);
      I from, rise;
      table.at((bits >> 20) - kFirst, &from, &rise);
      const I g = from + shift_right(rise * ((bits >> 8) & 0xfff), all(12));
      const I sign = d >> 31;
      return half + ((g ^ sign) - sign);
    }

    // About the number whose interval holds a target; how it comes to that has no bearing on the
    // format. `k`: a number that may lie about there, for the share that the numbers below take.
    I guess(I target, I k, I centre2, I m) const {
      const I c = most(least(target - k, all(2 * half)), all(0)) - half;
      const I sign = c >> 31, g = (c ^ sign) - sign;
      const I tail = as_bits(to_float(half - g));
      const I step = most((tail >> 21) - ((127 + 7) << 2), all(0));
      F from, rise;
      search_from.at(step, &from, &rise);
      const F rest = to_float(tail & 0x1fffff) * (1.0f / (1 << 21));
      I place = most(least(to_int(from + rise * rest), all(kCells - 1)), all(0));
      I start, size;
      table.at(place, &start, &size);
      place = place + ((g < start) | ((g >= start + size) & 1));
      place = most(least(place, all(kCells - 1)), all(0));
      table.at(place, &start, &size);
      const F begin = as_float((place + kFirst) << 20);
      // What a step of a share is in values.
      const F scale = 16384.0f / to_float(m);
      const F rate = (as_float((place + kFirst + 1) << 20) - begin) / to_float(size | 1) * scale;
      const F away = (begin - float(1 << (kZBits - 1))) * scale + (to_float(g - start) + 0.5f) * rate;
      const F v = to_float(centre2) * 0.5f + as_float(as_bits(away) ^ (sign & std::int32_t(0x80000000)));
      // Where numbers lie close, their count moves the share: once more with a better k.
      return grid.near(v - to_float(grid.near(v) - k) * rate);
    }

    // The interval of number k: its ends, its value and the |z| of its boundaries.
    void of(I k, I centre2, I m, I* low, I* high, I* value, I* z) const {
      const I under = grid.value(most(k - 1, all(0))), v = grid.value(k),
              over = grid.value(least(k + 1, all(numbers - 1)));
      const I d0 = under + v - centre2, d1 = v + over - centre2;
      const I z0 = z_of(d0, m), z1 = z_of(d1, m);
      const I lo = share(d0, z0) + k, hi = share(d1, z1) + k + 1;
      *low = k == 0 ? all(0) : lo;
      *high = k == numbers - 1 ? all(std::int32_t(kCdf)) : hi;
      *value = v;
      *z = (z0 + z1) >> 1;
    }

    // The number whose interval holds a target, by halving what is left, W ways at once.
    std::int32_t search(std::int32_t target, std::int32_t centre2, std::int32_t m) const {
      std::int32_t low = 0, end = numbers;
      while (end - low > 1) {
        const std::int32_t step = (end - low + W - 1) / W;
        const I k = least(low + step * lanes(), all(end - 1));
        const I d = grid.value(most(k - 1, all(0))) + grid.value(k) - centre2;
        const I at = share(d, z_of(d, all(m))) + k;
        const I below = ((k == 0 ? all(0) : at) <= target) & (k < end);
        std::int32_t last = 0;
        for (int i = 0; i < W; ++i) last = below[i] ? k[i] : last;
        end = std::min(end, last + step);
        low = last;
      }
      return low;
    }
  };

  // --- coders: what becomes of a channel's numbers and their intervals -------------------------
  // Called with what is expected of `n` tokens, twice the centres and how narrow they lie; fills in
  // their values and the |z| of their boundaries.

  // The numbers are known; their intervals are noted.
  template <typename T>
  struct Recorder {
    Intervals at;
    std::uint32_t* counts;
    std::int32_t half;

    void operator()(const Density& density, T* const* number, std::ptrdiff_t offset, std::size_t n,
                    const std::int32_t* centre2, const std::int32_t* m, std::int32_t* value, std::int32_t* z) {
      for (std::size_t t = 0; t < n; t += W) {
        I bits;
        for (int i = 0; i < W; ++i) bits[i] = number[t + std::size_t(i)][offset];
        const I k = (bits & half) != 0 ? 2 * half - 1 - bits : bits + half;
        I low, high, v, away;
        density.of(k, load(centre2 + t), load(m + t), &low, &high, &v, &away);
        store(at.start + t, low);
        store(at.size + t, high - low);
        store(value + t, v);
        store(z + t, away);
      }
      at.start += n;
      at.size += n;
    }
    bool good() const { return true; }
  };

  // The numbers are read.
  template <typename T>
  struct Reader {
    std::uint64_t* state;
    const std::uint8_t *word, *end;
    std::int32_t half;
    static constexpr std::uint32_t* counts = nullptr;
    bool ran_out = false;

    void operator()(const Density& density, T* const* number, std::ptrdiff_t offset, std::size_t n,
                    const std::int32_t* centre2, const std::int32_t* m, std::int32_t* value, std::int32_t* z) {
      for (std::size_t t = 0; t < n; t += kLanes)
        read(density, number + t, offset, std::min<std::size_t>(kLanes, n - t), centre2 + t, m + t, value + t,
             z + t);
    }
    bool good() const { return !ran_out; }

   private:
    // One number of each state. What a vector goes through is a long chain, so one vector begins before
    // the other is done: no loop needs what it has done for the vector before, but for the last.
    void read(const Density& density, T* const* number, std::ptrdiff_t offset, std::size_t n,
              const std::int32_t* centre2, const std::int32_t* m, std::int32_t* value, std::int32_t* z) {
      alignas(64) std::int32_t targets[kLanes], guesses[kLanes], sizes[kLanes], rests[kLanes];
      for (std::size_t t = 0; t < n; t += W) {
        I target;
        for (int i = 0; i < W; ++i) target[i] = std::int32_t(state[t + std::size_t(i)] & (kCdf - 1));
        const I centre = load(centre2 + t);
        store(targets + t, target);
        store(guesses + t, density.guess(target, density.grid.near(to_float(centre) * 0.5f), centre, load(m + t)));
      }
      for (std::size_t t = 0; t < n; t += W) {
        const std::size_t used = std::min<std::size_t>(W, n - t);
        const I target = load(targets + t);
        I k = load(guesses + t), low, high, v, away;
        density.of(k, load(centre2 + t), load(m + t), &low, &high, &v, &away);
        const I wrong = (lanes() < std::int32_t(used)) & ((target < low) | (target >= high));
        if (__builtin_expect(any(wrong), 0))
          find(density, target, wrong, load(centre2 + t), load(m + t), &k, &low, &high, &v, &away);
        store(sizes + t, high - low);
        store(rests + t, target - low);
        store(value + t, v);
        store(z + t, away);
        const I bits = k >= half ? k - half : 2 * half - 1 - k;
        for (std::size_t i = 0; i < used; ++i) number[t + i][offset] = T(bits[i]);
      }
      for (std::size_t t = 0; t < n; t += W) {
        std::uint64_t* const x = state + t;
        if (std::size_t(end - word) >= 4 * W && n - t >= W) {
          word = Isa::advance(x, (typename Isa::U)load(sizes + t), (typename Isa::U)load(rests + t), word);
          continue;
        }
        for (std::size_t i = 0; i < std::min<std::size_t>(W, n - t); ++i) {
          x[i] = std::uint64_t(std::uint32_t(sizes[t + i])) * (x[i] >> kCdfBits) + std::uint32_t(rests[t + i]);
          if (x[i] >= kLow) continue;
          std::uint32_t next = 0;
          if (word == end) {
            ran_out = true;
          } else {
            std::memcpy(&next, word, 4);
            word += 4;
          }
          x[i] = x[i] << 32 | next;
        }
      }
    }

    // The numbers and their intervals, where those in `k` are `wrong` ones.
    __attribute__((noinline)) static void find(const Density& density, I target, I wrong, I centre2, I m, I* k,
                                               I* low, I* high, I* value, I* z) {
      const I next = density.guess(target, *k, centre2, m);
      const I beside = target < *low ? *k - 1 : *k + 1;
      *k = wrong ? (next == *k ? beside : next) : *k;
      *k = most(least(*k, all(density.numbers - 1)), all(0));
      density.of(*k, centre2, m, low, high, value, z);
      wrong = wrong & ((target < *low) | (target >= *high));
      if (!any(wrong)) return;
      for (int i = 0; i < W; ++i)
        if (wrong[i]) (*k)[i] = density.search(target[i], centre2[i], m[i]);
      density.of(*k, centre2, m, low, high, value, z);
    }
  };

  // --- one part of a layer --------------------------------------------------------------------

  template <typename T, typename Coder>
  static bool run(const Model& model, const Layer& layer, int which, Form form, const Tokens& tokens,
                  const Block<T>& block, Coder& coder) {
    const Part& part = layer.part[which];
    for (std::size_t i = 0; i < tokens.tiles; ++i)
      if (!tile(model, layer, part, form, tokens, i, block, coder)) return false;
    return true;
  }

  template <typename T, typename Coder>
  static bool tile(const Model& model, const Layer& layer, const Part& part, Form form,
                   const Tokens& tokens, std::size_t number, const Block<T>& block, Coder& coder) {
    const Tile& tile = tokens.tile[number];
    const Region& region = layer.region[tile.region];
    const std::size_t n = tile.count, channels = part.heads * part.dim;
    const std::size_t width = layer.width, pairs = layer.part[0].heads * layer.part[0].pairs;
    const std::uint32_t* const input = tokens.input + number * (layer.inputs / 4) * kTile;
    std::uint32_t* const residual = tokens.residual + number * layer.blocks * kTile;
    std::uint32_t* const output = tokens.output + number * layer.blocks * kTile;
    const bool table = layer.table16 || layer.table8;

    T* at[kTile];  // each token's numbers, as if of channel 0
    alignas(64) std::int32_t energy[kTile], calm[kTile], deviation[kTile] = {}, known[kTile];
    std::int32_t entry[kTile];
    std::int16_t* const sine = tokens.turn;
    std::int16_t* const cosine = sine + part.pairs * kTile;
    std::int16_t* const angle = cosine + part.pairs * kTile;
    for (std::size_t t = 0; t < kTile; ++t) {
      // What is past the last token goes along with it, and is never looked at.
      const std::size_t token = tokens.at[tile.start + std::min(t, n - 1)];
      const std::size_t row = token / tokens.count, column = token % tokens.count;
      at[t] = block.data + std::ptrdiff_t(row) * block.row_stride +
              std::ptrdiff_t(column) * block.token_stride;
      energy[t] = tokens.energy[token];
      calm[t] = (1 << 24) / energy[t];
      entry[t] = tokens.entry[token];
      known[t] = table && entry[t] >= 0 ? -1 : 0;
      const std::uint64_t position = tokens.position + column;
      for (std::size_t p = 0; p < part.pairs; ++p) {
        const std::uint64_t phase = part.step[p] * position;
        const auto turn = std::size_t((phase + (std::uint64_t(1) << 51)) >> 52) & 4095;
        sine[p * kTile + t] = model.sine[turn];
        cosine[p * kTile + t] = model.sine[(turn + 1024) & 4095];
        angle[p * kTile + t] = std::int16_t(turn / (4096 / kAngles));
      }
    }
    const auto offset = [&](std::size_t place) {
      const auto c = std::size_t(part.order[place]);
      return std::ptrdiff_t(c / part.dim) * block.head_stride +
             std::ptrdiff_t(c % part.dim) * block.dim_stride;
    };
    const auto wide = [](const std::int16_t* p) {
      I v;
      for (int i = 0; i < W; ++i) v[i] = p[i];
      return v;
    };

    // Predictions of four channels: two blocks of them at most are needed at once.
    struct Four {
      std::size_t block = ~std::size_t(0);
      alignas(64) std::int32_t base[4][kTile], sums[4][kTile];
    } fours[2];
    const auto four = [&](std::size_t channel) -> Four& {
      const std::size_t b = channel / 4;
      Four& f = fours[b % 2];
      if (f.block == b) return f;
      f.block = b;
      const auto order = [&](const Order* of) { return Isa::kInOrder ? of + b : nullptr; };
      Isa::products(input, region.weight + b * layer.inputs * 4, layer.inputs / 4, order(region.weight_order),
                    region.weight_start + 4 * b, n, f.base);
      Isa::products(residual, region.within + b * layer.blocks * 16, b, order(region.within_order),
                    region.within_start + 4 * b, n, f.sums);
      for (std::size_t o = 0; o < std::min<std::size_t>(4, width - 4 * b); ++o) {
        const std::size_t c = 4 * b + o;
        const I bias = all(region.bias[c]), scale = all(region.weight_scale[c]);
        for (std::size_t t = 0; t < n; t += W) {
          const I sum = load(f.base[o] + t);
          store(f.base[o] + t, clamp(bias + Isa::template scaled<20>(sum, scale), kClamp));
        }
        if (table)
          for (std::size_t t = 0; t < n; ++t)
            if (known[t])
              f.base[o][t] += layer.table16 ? layer.table16[std::size_t(entry[t]) * width + c] * 8
                                            : layer.table8[std::size_t(entry[t]) * width + c] * 1024;
      }
      return f;
    };
    // Where channel c is expected, before it is turned.
    const auto expected = [&](const Four& f, std::size_t c, std::size_t t) {
      const std::int8_t* const w = region.within + (c / 4 * layer.blocks + c / 4) * 16 + c % 4 * 4;
      const I sum = Isa::dot(load(f.sums[c % 4] + t), load(residual + c / 4 * kTile + t), w);
      return clamp(load(f.base[c % 4] + t) + Isa::template scaled<20>(sum, all(region.within_scale[c])),
                   kClamp);
    };
    const auto know = [&](const Four& f, std::size_t c, std::size_t t, I v) {
      const I r = (v - load(f.base[c % 4] + t) + (1 << (kResidualShift - 1))) >> kResidualShift;
      const I q = Isa::template scaled<28>(v - layer.mean[c], all(layer.input_scale[c]));
      const int shift = int(c % 4) * 8;
      std::uint32_t* const rs = residual + c / 4 * kTile + t;
      std::uint32_t* const qs = output + c / 4 * kTile + t;
      store(rs, (load(rs) & ~(255 << shift)) | ((clamp(r, 127) + 128) << shift));
      store(qs, (load(qs) & ~(255 << shift)) | ((clamp(q, 127) + 128) << shift));
    };
    const auto of_class = [&](const std::int32_t* array, std::size_t size, bool is_known) {
      return array + (layer.regions * std::size_t(is_known) + tile.region) * size;
    };
    // 2^15 z for each unit of twice the deviation.
    const auto narrow = [&](std::size_t t, I inv) { return Isa::template product<12>(inv, load(calm + t)); };
    alignas(64) std::int32_t centre2[kTile], narrows[kTile], xs[kTile], ys[kTile], zs[kTile];
    // What a channel's numbers tell of how far numbers lie from where they are expected.
    const auto tally = [&](std::size_t place, const std::int32_t* values) {
      for (std::size_t t = 0; t < n; t += W)
        store(deviation + t, load(deviation + t) + least(load(zs + t) >> (kZBits - 8), all(2048)));
      if (!coder.counts) return;
      for (std::size_t t = 0; t < n; t += W) {
        const I cell = Density::cell_of(Density::z_of(2 * load(values + t) - load(centre2 + t), load(narrows + t)));
        for (std::size_t i = 0; i < std::min<std::size_t>(W, n - t); ++i)
          ++coder.counts[((layer.regions * (known[t + i] != 0) + tile.region) * channels + place) * kCells +
                         std::size_t(cell[i])];
      }
    };

    std::size_t counted = 0;
    for (std::size_t place = 0; place < channels;) {
      const std::size_t c = part.first + place;
      const Four& one = four(c);
      const Density first(model.densities, layer.density[c], form, layer.unit[c]);
      if (place % part.dim < 2 * part.pairs) {
        const Four& two = four(c + 1);
        const std::size_t p = place % part.dim / 2, pair = place / part.dim * part.pairs + p;
        const std::ptrdiff_t from = offset(place), other = offset(place + 1);
        alignas(64) std::int32_t ps[kTile], qs[kTile];
        const auto by_angle = [&](const std::int32_t* array, std::size_t size, std::size_t row, std::size_t t) {
          const I turn = wide(angle + p * kTile + t);
          const I plain = Isa::at32(of_class(array, size, false) + row * kAngles, turn);
          if (!table) return plain;
          return load(known + t) != 0 ? Isa::at32(of_class(array, size, true) + row * kAngles, turn) : plain;
        };
        const std::size_t all_pairs = pairs * kAngles;
        for (std::size_t t = 0; t < n; t += W) {
          const I sin = wide(sine + p * kTile + t), cos = wide(cosine + p * kTile + t);
          const I a = expected(one, c, t), b = expected(two, c + 1, t);
          const I x0 = Isa::turned(a, cos, b, -sin);
          store(ps + t, x0);
          store(qs + t, Isa::turned(b, cos, a, sin));
          store(centre2 + t, 2 * x0);
          store(narrows + t, narrow(t, by_angle(layer.pair_inverse, 2 * all_pairs, 2 * pair, t)));
        }
        coder(first, at, from, n, centre2, narrows, xs, zs);
        tally(place, xs);
        const Density second(model.densities, layer.density[c + 1], form, layer.unit[c + 1]);
        for (std::size_t t = 0; t < n; t += W) {
          const I slope = by_angle(layer.pair_slope, all_pairs, pair, t);
          const I off = Isa::template scaled<12>(load(xs + t) - load(ps + t), slope);
          store(centre2 + t, 2 * clamp(load(qs + t) + off, kClamp));
          store(narrows + t, narrow(t, by_angle(layer.pair_inverse, 2 * all_pairs, 2 * pair + 1, t)));
        }
        coder(second, at, other, n, centre2, narrows, ys, zs);
        tally(place + 1, ys);
        for (std::size_t t = 0; t < n; t += W) {
          const I x = load(xs + t), y = load(ys + t);
          const I sin = wide(sine + p * kTile + t), cos = wide(cosine + p * kTile + t);
          know(one, c, t, clamp(Isa::turned(x, cos, y, sin), kClamp));
          know(two, c + 1, t, clamp(Isa::turned(y, cos, x, -sin), kClamp));
        }
        place += 2;
        counted += 2;
      } else {
        for (std::size_t t = 0; t < n; t += W) {
          I inv = all(of_class(layer.inverse, width, false)[c]);
          if (table) inv = load(known + t) != 0 ? all(of_class(layer.inverse, width, true)[c]) : inv;
          store(centre2 + t, 2 * expected(one, c, t));
          store(narrows + t, narrow(t, inv));
        }
        coder(first, at, offset(place), n, centre2, narrows, xs, zs);
        tally(place, xs);
        for (std::size_t t = 0; t < n; t += W) know(one, c, t, load(xs + t));
        place += 1;
        counted += 1;
      }
      if (counted >= kGroup) {
        for (std::size_t t = 0; t < n; ++t) {
          const std::int32_t off = deviation[t] / std::int32_t(counted) - 256;
          deviation[t] = 0;
          if (known[t] && layer.table16) continue;  // rounding is all that is left of it
          energy[t] = std::min(std::max(energy[t] + (energy[t] * off >> 11), 256), 1 << 16);
          calm[t] = (1 << 24) / energy[t];
        }
        counted = 0;
      }
      if (!coder.good()) return false;
    }
    for (std::size_t t = 0; t < n; ++t) tokens.energy[tokens.at[tile.start + t]] = energy[t];
    return true;
  }

  template <typename T>
  static void model(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
                    const Block<const T>& block, Intervals intervals, std::uint32_t* counts) {
    Recorder<const T> coder{intervals, counts, 1 << (form.bits() - 1)};
    run(m, layer, part, form, tokens, block, coder);
  }

  template <typename T>
  static bool decode(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
                     const Block<T>& block, std::uint64_t* states, const std::uint8_t* words,
                     const std::uint8_t* end) {
    for (int i = 0; i < kLanes; ++i)
      if (states[i] < kLow || states[i] >> 63) return false;
    Reader<T> coder{states, words, end, 1 << (form.bits() - 1)};
    if (!run(m, layer, part, form, tokens, block, coder) || coder.word != end) return false;
    return std::all_of(states, states + kLanes, [](std::uint64_t x) { return x == kLow; });
  }

  static constexpr Kernels kernels() {
    return {Isa::kInOrder, Isa::products, model<std::uint8_t>, model<std::uint16_t>, decode<std::uint8_t>,
            decode<std::uint16_t>};
  }
};

}  // namespace
}  // namespace kvzip::predictive
