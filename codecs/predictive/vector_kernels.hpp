// The kernels, written once over vectors of W numbers of 32 bits; `Isa` has the vectors and the few
// operations that differ between instruction sets. Signed numbers wrap (-fwrapv).
#pragma once

#include <algorithm>
#include <cstring>

#include "predictive/density.hpp"

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
struct Of : Distribution<Isa> {
  using Base = Distribution<Isa>;
  using Base::all, Base::any, Base::clamp, Base::lanes, Base::least, Base::load, Base::most,
      Base::store, Base::to_float, Base::to_int, Base::W;
  using typename Base::Density;
  using typename Base::I;

  // --- coders: what becomes of a channel's numbers and their intervals -------------------------
  // Called with a lane, what is expected of `n` tokens, the centres and how narrow they lie; fills
  // in their values and the |z| of their boundaries.

  // The numbers are known; their intervals are noted.
  template <typename T>
  struct Recorder {
    Intervals at;
    std::uint32_t* counts;
    std::int32_t half;

    void begin(const Tokens&, const Tile&, std::size_t) {}
    bool end(const Tokens&, const Tile&, std::size_t) { return true; }
    void operator()(std::size_t, const Density& density, T* const* number, std::ptrdiff_t offset,
                    std::size_t n, const std::int32_t* centre, const std::int32_t* m,
                    std::int32_t* value, std::int32_t* z) {
      for (std::size_t t = 0; t < n; t += W) {
        I bits;
        for (int i = 0; i < W; ++i) bits[i] = number[t + std::size_t(i)][offset];
        const I k = (bits & half) != 0 ? 2 * half - 1 - bits : bits + half;
        I low, high, v, away;
        density.of(k, load(centre + t), load(m + t), &low, &high, &v, &away);
        store(at.start + t, high > low ? low : k);
        store(at.size + t, most(high - low, all(0)));
        store(value + t, v);
        store(z + t, away);
      }
      at.start += n;
      at.size += n;
    }
  };

  // The numbers are read.
  template <typename T>
  struct Reader {
    const Coded& coded;
    std::int32_t half;
    static constexpr std::uint32_t* counts = nullptr;
    bool ran_out = false;
    // Of the tile that is read: states, and each lane's two streams.
    alignas(64) std::uint64_t state[kMostLanes][kTile];
    const std::uint8_t* word[kMostLanes][2];
    const std::uint8_t* last[kMostLanes][2];

    Reader(const Coded& from, std::int32_t numbers) : coded(from), half(numbers) {}

    void begin(const Tokens& tokens, const Tile& tile, std::size_t lanes) {
      for (std::size_t t = 0; t < tile.count; ++t)
        for (std::size_t l = 0; l < lanes; ++l)
          state[l][t] = coded.state[tokens.at[tile.start + t] * lanes + l];
      for (std::size_t l = 0; l < lanes; ++l)
        std::fill(state[l] + tile.count, state[l] + kTile, kLow);
      for (std::size_t h = 0; h < tile.streams(); ++h)
        for (std::size_t l = 0; l < lanes; ++l) {
          word[l][h] = coded.word[(tile.stream + h) * lanes + l];
          last[l][h] = coded.end[(tile.stream + h) * lanes + l];
        }
    }
    // Whether all words were taken and no more.
    bool end(const Tokens& tokens, const Tile& tile, std::size_t lanes) {
      for (std::size_t t = 0; t < tile.count; ++t)
        for (std::size_t l = 0; l < lanes; ++l)
          coded.state[tokens.at[tile.start + t] * lanes + l] = state[l][t];
      bool good = !ran_out;
      for (std::size_t h = 0; h < tile.streams(); ++h)
        for (std::size_t l = 0; l < lanes; ++l) good = good && word[l][h] == last[l][h];
      return good;
    }

    // What a vector goes through is a long chain, so one vector begins before the other is done: no
    // loop needs what it has done for the vector before, but for the last.
    void operator()(std::size_t lane, const Density& density, T* const* number,
                    std::ptrdiff_t offset, std::size_t n, const std::int32_t* centre,
                    const std::int32_t* m, std::int32_t* value, std::int32_t* z) {
      alignas(64) std::int32_t targets[kTile], guesses[kTile], sizes[kTile], rests[kTile];
      std::uint64_t* const x = state[lane];
      std::uint64_t escapes = 0;
      for (std::size_t t = 0; t < n; t += W) {
        I target;
        for (int i = 0; i < W; ++i) target[i] = std::int32_t(x[t + std::size_t(i)] & (kCdf - 1));
        const I c = load(centre + t);
        store(targets + t, target);
        store(guesses + t, density.guess(target, c, load(m + t)));
      }
      for (std::size_t t = 0; t < n; t += W) {
        const std::size_t used = std::min<std::size_t>(W, n - t);
        const I target = load(targets + t);
        I k = load(guesses + t), low, high, v, away;
        density.of(k, load(centre + t), load(m + t), &low, &high, &v, &away);
        const I wrong = (lanes() < std::int32_t(used)) & ((target < low) | (target >= high));
        if (__builtin_expect(any(wrong), 0))
          escapes |= find(density, target, wrong, load(centre + t), load(m + t), &k, &low, &high,
                          &v, &away)
                     << t;
        store(sizes + t, high - low);
        store(rests + t, target - low);
        store(value + t, v);
        store(z + t, away);
        const I bits = k >= half ? k - half : 2 * half - 1 - k;
        for (std::size_t i = 0; i < used; ++i) number[t + i][offset] = T(bits[i]);
      }
      for (std::size_t t = 0; t < n; t += W) {
        const std::uint8_t*& next = word[lane][t / kStream];
        const std::uint8_t* const stop = last[lane][t / kStream];
        if (std::size_t(stop - next) >= 4 * W && n - t >= W) {
          next = Isa::advance(x + t, (typename Isa::U)load(sizes + t),
                              (typename Isa::U)load(rests + t), next);
          continue;
        }
        for (std::size_t i = t; i < t + std::min<std::size_t>(W, n - t); ++i)
          step(x[i], std::uint32_t(sizes[i]), std::uint32_t(rests[i]), &next, stop);
      }
      if (__builtin_expect(escapes != 0, 0)) {
        const int spare = kCdfBits - density.bits;
        for (std::size_t t = 0; t < n; ++t) {
          if (!(escapes >> t & 1)) continue;
          const auto target = std::uint32_t(x[t] & (kCdf - 1));
          step(x[t], 1u << spare, target & ((1u << spare) - 1), &word[lane][t / kStream],
               last[lane][t / kStream]);
          const auto k = std::int32_t(target >> spare);
          I low, high, v, away;
          density.of(all(k), all(centre[t]), all(m[t]), &low, &high, &v, &away);
          value[t] = v[0];
          z[t] = away[0];
          number[t][offset] = T(k >= half ? k - half : 2 * half - 1 - k);
        }
      }
    }

   private:
    void step(std::uint64_t& x, std::uint32_t size, std::uint32_t rest, const std::uint8_t** next,
              const std::uint8_t* stop) {
      x = std::uint64_t(size) * (x >> kCdfBits) + rest;
      if (x >= kLow) return;
      std::uint32_t found = 0;
      if (*next == stop) {
        ran_out = true;
      } else {
        std::memcpy(&found, *next, 4);
        *next += 4;
      }
      x = x << 32 | found;
    }

    // The numbers and their intervals, where those in `k` are `wrong` ones. Returns which are
    // escapes: their interval is that of the escape.
    __attribute__((noinline)) static std::uint64_t find(const Density& density, I target, I wrong,
                                                        I centre, I m, I* k, I* low, I* high,
                                                        I* value, I* z) {
      const I escape = wrong & (target >= std::int32_t(kCdf - kEscape));
      wrong = wrong & ~escape;
      // Mostly it is the one beside.
      const I beside = target < *low ? *k - 1 : *k + 1;
      *k = wrong ? most(least(beside, all(density.numbers - 1)), all(0)) : *k;
      density.of(*k, centre, m, low, high, value, z);
      wrong = wrong & ((target < *low) | (target >= *high));
      if (any(wrong)) {
        for (int i = 0; i < W; ++i)
          if (wrong[i]) (*k)[i] = density.search(target[i], centre[i], m[i]);
        density.of(*k, centre, m, low, high, value, z);
      }
      std::uint64_t which = 0;
      if (any(escape)) {
        *low = escape ? all(std::int32_t(kCdf - kEscape)) : *low;
        *high = escape ? all(std::int32_t(kCdf)) : *high;
        for (int i = 0; i < W; ++i) which |= std::uint64_t(escape[i] & 1) << i;
      }
      return which;
    }
  };

  // --- one part of a layer --------------------------------------------------------------------

  template <typename T, typename Coder>
  static bool run(const Model& model, const Layer& layer, int which, Form form,
                  const Tokens& tokens, const Block<T>& block, Coder& coder) {
    const Part& part = layer.part[which];
    for (std::size_t i = 0; i < tokens.tiles; ++i)
      if (!TileOf<T, Coder>(model, layer, part, form, tokens, i, block, coder).run()) return false;
    return true;
  }

  // One tile's numbers, a group of channels after the other.
  template <typename T, typename Coder>
  struct TileOf {
    const Model& model;
    const Layer& layer;
    const Part& part;
    const Form form;
    const Tokens& tokens;
    const Tile& tile;
    const Block<T>& block;
    Coder& coder;
    const Region& region = layer.region[tile.region];
    const std::size_t n = tile.count, pairs = layer.part[0].heads * layer.part[0].pairs;
    const bool table = layer.table16 || layer.table8;
    const std::uint32_t* const input;
    std::uint32_t *const residual, *const output;

    T* at[kTile];  // each token's numbers, as if of channel 0
    alignas(64) std::int32_t energy[kTile], calm[kTile], deviation[kTile] = {}, known[kTile];
    std::int32_t entry[kTile];
    std::int16_t* const sine = tokens.turn;
    std::int16_t* const cosine = sine + part.pairs * kTile;
    std::int16_t* const angle = cosine + part.pairs * kTile;
    // Of a group's channels, from the first of a block of four on: what other layers say, and where
    // they are expected before they are turned.
    std::size_t from = 0;
    alignas(64) std::int32_t base[kMostGroup + 6][kTile], expected[kMostGroup + 6][kTile];
    alignas(64) std::int32_t centre[kTile], narrows[kTile], xs[kTile], ys[kTile], zs[kTile];

    TileOf(const Model& m, const Layer& l, const Part& p, Form f, const Tokens& all_tokens,
           std::size_t number, const Block<T>& b, Coder& c)
        : model(m),
          layer(l),
          part(p),
          form(f),
          tokens(all_tokens),
          tile(all_tokens.tile[number]),
          block(b),
          coder(c),
          input(tokens.input + number * (layer.inputs / 4) * kTile),
          residual(tokens.residual + number * layer.blocks * kTile),
          output(tokens.output + number * layer.blocks * kTile) {
      for (std::size_t t = 0; t < kTile; ++t) {
        // What is past the last token goes along with it, and is never looked at.
        const std::size_t token = tokens.at[tile.start + std::min(t, n - 1)];
        const std::size_t row = token / tokens.count, column = token % tokens.count;
        at[t] = block.data + std::ptrdiff_t(row) * block.row_stride +
                std::ptrdiff_t(column) * block.token_stride;
        energy[t] = tokens.energy[token];
        entry[t] = tokens.entry[token];
        known[t] = table && entry[t] >= 0 ? -1 : 0;
        const std::uint64_t position = tokens.position + column;
        for (std::size_t i = 0; i < part.pairs; ++i) {
          const std::uint64_t phase = part.step[i] * position;
          const auto turn = std::size_t((phase + (std::uint64_t(1) << 51)) >> 52) & 4095;
          sine[i * kTile + t] = model.sine[turn];
          cosine[i * kTile + t] = model.sine[(turn + 1024) & 4095];
          angle[i * kTile + t] = std::int16_t(turn / (4096 / kAngles));
        }
      }
      calm_down();
    }

    bool run() {
      coder.begin(tokens, tile, layer.lanes);
      const std::size_t channels = part.channels();
      for (std::size_t start = 0, end; start < channels; start = end) {
        end = std::min(start + layer.group, channels);
        expect(part.first + start, part.first + end);
        for (std::size_t place = start; place < end; place += 2) {
          const std::size_t lane = (place - start) / 2 % layer.lanes;
          if (place < part.turned()) {
            turned(lane, place);
          } else {
            alone(lane, place);
            if (place + 1 < end) alone(lane, place + 1);
          }
        }
        learn(std::int32_t(end - start));
      }
      for (std::size_t t = 0; t < n; ++t) tokens.energy[tokens.at[tile.start + t]] = energy[t];
      return coder.end(tokens, tile, layer.lanes);
    }

   private:
    static I wide(const std::int16_t* p) {
      I v;
      for (int i = 0; i < W; ++i) v[i] = p[i];
      return v;
    }
    std::ptrdiff_t offset(std::size_t place) const {
      const auto c = std::size_t(part.order[place]);
      return std::ptrdiff_t(c / part.dim) * block.head_stride +
             std::ptrdiff_t(c % part.dim) * block.dim_stride;
    }

    // Where the channels from `begin` on are expected; none looks at another one of them.
    void expect(std::size_t begin, std::size_t end) {
      from = begin / 4 * 4;
      for (std::size_t b = begin / 4; 4 * b < end; ++b) {
        std::int32_t (*const bases)[kTile] = base + 4 * b - from;
        std::int32_t (*const sums)[kTile] = expected + 4 * b - from;
        const auto order = [&](const Order* of) { return Isa::kInOrder ? of + b : nullptr; };
        Isa::products(input, region.weight + b * layer.inputs * 4, layer.inputs / 4,
                      order(region.weight_order), region.weight_start + 4 * b, n, bases);
        Isa::products(residual, region.within + b * layer.blocks * 16, layer.reads[b],
                      order(region.within_order), region.within_start + 4 * b, n, sums);
        for (std::size_t o = 0; o < std::min<std::size_t>(4, layer.width - 4 * b); ++o) {
          const std::size_t c = 4 * b + o;
          const I bias = all(region.bias[c]), scale = all(region.weight_scale[c]);
          for (std::size_t t = 0; t < n; t += W)
            store(bases[o] + t,
                  clamp(bias + Isa::template scaled<20>(load(bases[o] + t), scale), kClamp));
          if (table)
            for (std::size_t t = 0; t < n; ++t)
              if (known[t])
                bases[o][t] += layer.table16
                                   ? layer.table16[std::size_t(entry[t]) * layer.width + c] * 32
                                   : layer.table8[std::size_t(entry[t]) * layer.width + c] * 4096;
          const I within = all(region.within_scale[c]);
          for (std::size_t t = 0; t < n; t += W)
            store(sums[o] + t,
                  clamp(load(bases[o] + t) + Isa::template scaled<20>(load(sums[o] + t), within),
                        kClamp));
        }
      }
    }

    // What channel c tells the channels and layers after it.
    void know(std::size_t c, std::size_t t, I v) {
      const I r = (v - load(base[c - from] + t) + (1 << (kResidualShift - 1))) >> kResidualShift;
      const I q = Isa::template scaled<28>(v - layer.mean[c], all(layer.input_scale[c]));
      const int shift = int(c % 4) * 8;
      std::uint32_t* const rs = residual + c / 4 * kTile + t;
      std::uint32_t* const qs = output + c / 4 * kTile + t;
      store(rs, (load(rs) & ~(255 << shift)) | ((clamp(r, 127) + 128) << shift));
      store(qs, (load(qs) & ~(255 << shift)) | ((clamp(q, 127) + 128) << shift));
    }
    const std::int32_t* of_class(const std::int32_t* array, std::size_t size, bool is_known) const {
      return array + (layer.regions * std::size_t(is_known) + tile.region) * size;
    }
    // 2^13 z for each unit of twice the deviation.
    I narrow(std::size_t t, I inv) const { return Isa::template product<12>(inv, load(calm + t)); }

    // What a channel's numbers tell of how far numbers lie from where they are expected.
    void tally(std::size_t place, const std::int32_t* values) {
      for (std::size_t t = 0; t < n; t += W)
        store(deviation + t, load(deviation + t) + least(load(zs + t) >> (kZBits - 8), all(2048)));
      if (!coder.counts) return;
      for (std::size_t t = 0; t < n; t += W) {
        const I cell = Density::cell_of(
            Density::z_of(2 * (load(values + t) - load(centre + t)), load(narrows + t)));
        for (std::size_t i = 0; i < std::min<std::size_t>(W, n - t); ++i)
          ++coder.counts[((layer.regions * (known[t + i] != 0) + tile.region) * part.channels() +
                          place) *
                             kCells +
                         std::size_t(cell[i])];
      }
    }

    void alone(std::size_t lane, std::size_t place) {
      const std::size_t c = part.first + place;
      const Density density(model.densities, layer.density[c], form, layer.unit[c]);
      for (std::size_t t = 0; t < n; t += W) {
        I inv = all(of_class(layer.inverse, layer.width, false)[c]);
        if (table)
          inv = load(known + t) != 0 ? all(of_class(layer.inverse, layer.width, true)[c]) : inv;
        store(centre + t, load(expected[c - from] + t));
        store(narrows + t, narrow(t, inv));
      }
      coder(lane, density, at, offset(place), n, centre, narrows, xs, zs);
      tally(place, xs);
      for (std::size_t t = 0; t < n; t += W) know(c, t, load(xs + t));
    }

    // Two channels that RoPE turns together.
    void turned(std::size_t lane, std::size_t place) {
      const std::size_t c = part.first + place, pair = place / 2;
      const std::size_t p = std::size_t(part.order[place]) % part.dim, all_pairs = pairs * kAngles;
      const std::int16_t *const sines = sine + p * kTile, *const cosines = cosine + p * kTile;
      const auto by_angle = [&](const std::int32_t* array, std::size_t size, std::size_t row,
                                std::size_t t) {
        const I turn = wide(angle + p * kTile + t);
        const I plain = Isa::at32(of_class(array, size, false) + row * kAngles, turn);
        if (!table) return plain;
        return load(known + t) != 0 ? Isa::at32(of_class(array, size, true) + row * kAngles, turn)
                                    : plain;
      };
      alignas(64) std::int32_t ps[kTile], qs[kTile];
      for (std::size_t t = 0; t < n; t += W) {
        const I sin = wide(sines + t), cos = wide(cosines + t);
        const I a = load(expected[c - from] + t), b = load(expected[c + 1 - from] + t);
        const I x0 = Isa::turned(a, cos, b, -sin);
        store(ps + t, x0);
        store(qs + t, Isa::turned(b, cos, a, sin));
        store(centre + t, x0);
        store(narrows + t, narrow(t, by_angle(layer.pair_inverse, 2 * all_pairs, 2 * pair, t)));
      }
      const Density first(model.densities, layer.density[c], form, layer.unit[c]);
      coder(lane, first, at, offset(place), n, centre, narrows, xs, zs);
      tally(place, xs);
      for (std::size_t t = 0; t < n; t += W) {
        const I slope = by_angle(layer.pair_slope, all_pairs, pair, t);
        const I off = Isa::template scaled<12>(load(xs + t) - load(ps + t), slope);
        store(centre + t, clamp(load(qs + t) + off, kClamp));
        store(narrows + t, narrow(t, by_angle(layer.pair_inverse, 2 * all_pairs, 2 * pair + 1, t)));
      }
      const Density second(model.densities, layer.density[c + 1], form, layer.unit[c + 1]);
      coder(lane, second, at, offset(place + 1), n, centre, narrows, ys, zs);
      tally(place + 1, ys);
      for (std::size_t t = 0; t < n; t += W) {
        const I x = load(xs + t), y = load(ys + t);
        const I sin = wide(sines + t), cos = wide(cosines + t);
        know(c, t, clamp(Isa::turned(x, cos, y, sin), kClamp));
        know(c + 1, t, clamp(Isa::turned(y, cos, x, -sin), kClamp));
      }
    }

    // The energies of the tokens, after a group of channels.
    void learn(std::int32_t channels) {
      for (std::size_t t = 0; t < n; t += W) {
        const I e = load(energy + t), off = load(deviation + t) - 256 * channels;
        const I now = e + ((e >> 3) * off >> 12);
        const I found = most(least(now, all(1 << 16)), all(1 << 8));
        store(deviation + t, all(0));
        // Of a known token rounding is all that is left.
        store(energy + t, layer.table16 ? (load(known + t) != 0 ? e : found) : found);
      }
      calm_down();
    }
    // 2^24 / energy, rounded down.
    void calm_down() {
      for (std::size_t t = 0; t < kTile; t += W) {
        const I e = load(energy + t);
        I q = to_int(float(1 << 24) / to_float(e));
        q += (q * e > (1 << 24));
        store(calm + t, q - ((q + 1) * e <= (1 << 24)));
      }
    }
  };

  template <typename T>
  static void model(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
                    const Block<const T>& block, Intervals intervals, std::uint32_t* counts) {
    Recorder<const T> coder{intervals, counts, 1 << (form.bits() - 1)};
    run(m, layer, part, form, tokens, block, coder);
  }

  template <typename T>
  static bool decode(const Model& m, const Layer& layer, int part, Form form, const Tokens& tokens,
                     const Block<T>& block, const Coded& coded) {
    Reader<T> coder(coded, 1 << (form.bits() - 1));
    return run(m, layer, part, form, tokens, block, coder);
  }

  static constexpr Kernels kernels() {
    return {Isa::kInOrder,        Isa::products,        model<std::uint8_t>,
            model<std::uint16_t>, decode<std::uint8_t>, decode<std::uint16_t>};
  }
};

}  // namespace
}  // namespace kvzip::predictive
