// The kernels, written once over vectors (vectors.hpp). A tile's numbers are coded a group of
// channels after the other: predicted from the layers and groups before, coded, and told to those
// that follow.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "predictive/interval_coders.hpp"
#include "predictive/rotation.hpp"
#include "predictive/state_encoder.hpp"
#include "predictive/transposing.hpp"

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

// A matrix unit while a part's tiles are coded, if there is one. It multiplies the inputs of
// several tiles of a region, before they are coded, so that weights are fetched once for them.
class UnitInUse {
 public:
  UnitInUse(const Layer& l, const Part& p, const Tokens& t)
      : layer(l), part(p), tokens(t), unit(t.products.unit) {
    if (unit) unit->begin();
  }
  UnitInUse(const UnitInUse&) = delete;
  ~UnitInUse() {
    if (unit) unit->end();
  }
  // Of the part's channels with the inputs of a tile. Tiles follow each other.
  const std::int32_t (*sums(std::size_t tile)) [kTile] {
    if (!unit) return nullptr;
    const std::uint32_t region = tokens.tile[tile].region;
    if (tile == end) {
      if (!tile || tokens.tile[tile - 1].region != region) {
        take(layer.region[region]);
        look_ahead(tile);
      }
      for (first = tile; end < tokens.tiles && end - first < kUnitTiles; ++end)
        if (tokens.tile[end].region != region) break;
      const std::size_t groups = layer.inputs / 4;
      unit->products_of_tiles(tokens.input + first * groups * kTile, groups, tokens.unit_weight,
                              rows, 4 * part.blocks(), tokens.tile + first, end - first,
                              tokens.unit_sums);
    }
    return tokens.unit_sums + (tile - first) * rows;
  }
  // To be called for each group of channels: a piece of the next region's weights comes from memory
  // while these are coded.
  void fetch() {
    for (const std::size_t stop = std::min(fetched + piece, to_fetch); fetched < stop;
         fetched += 64)
      __builtin_prefetch(ahead + fetched, 0, 2);
  }

 private:
  static constexpr std::size_t kMostAhead = 1 << 19;  // of the second-level cache
  void look_ahead(std::size_t tile) {
    std::size_t next = tile;
    while (next < tokens.tiles && tokens.tile[next].region == tokens.tile[tile].region) ++next;
    const std::size_t size = part.blocks() * layer.inputs * 4;
    if (next == tokens.tiles || size > kMostAhead) return;
    ahead = layer.region[tokens.tile[next].region].weight + part.first_block() * layer.inputs * 4;
    fetched = 0;
    to_fetch = size;
    piece = size / ((next - tile) * (part.channels() / layer.group + 1)) + 64;
  }
  void take(const Region& region) {
    const std::size_t block = part.first_block(), blocks = part.blocks();
    unit->arrange(region.weight + block * layer.inputs * 4, blocks, layer.inputs / 4, nullptr,
                  unit_steps(layer.inputs / 4), rows, tokens.unit_weight);
    unit->arrange(region.within + block * layer.blocks * 16, blocks, layer.blocks,
                  layer.reads + block, unit_steps(layer.reads[block + blocks - 1]), rows,
                  tokens.unit_within);
  }

  const Layer& layer;
  const Part& part;
  const Tokens& tokens;
  const MatrixUnit* const unit;
  const std::size_t rows = unit_rows(part.blocks());
  std::size_t first = 0, end = 0;  // tiles of which there are sums
  const std::int8_t* ahead = nullptr;
  std::size_t fetched = 0, to_fetch = 0, piece = 0;
};

// Codes one tile of a part. `Coder`: one of interval_coders.hpp.
template <class Isa, typename T, typename Coder>
class TileCoder : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::all, Base::clamp, Base::min_of, Base::load, Base::max_of, Base::store, Base::to_float,
      Base::to_int, Base::W, Base::widened;
  using typename Base::F, typename Base::I;

 public:
  TileCoder(const Model& m, const Layer& l, const Part& p, NumberFormat f, const Tokens& all_tokens,
            std::size_t number, const Block<T>& b, Coder& c, UnitInUse& u)
      : model(m),
        layer(l),
        part(p),
        format(f),
        tokens(all_tokens),
        tile(all_tokens.tile[number]),
        block(b),
        coder(c),
        unit(u),
        input_sums(u.sums(number)),
        input(tokens.input + number * (layer.inputs / 4) * kTile),
        residual(tokens.residual + number * layer.blocks * kTile),
        output(tokens.output + number * layer.blocks * kTile) {}

  // Whether what is read fits.
  bool run() {
    load_tokens();
    if (std::is_const_v<T>) move_numbers();
    coder.begin(tokens, tile, layer.lanes);
    const std::size_t channels = part.channels();
    for (std::size_t start = 0, end; start < channels; start = end) {
      end = std::min(start + layer.group, channels);
      predict(part.first + start, part.first + end);
      if constexpr (kUnturns)
        if (tokens.rotation) unturn(start, std::min(end, part.turned()));
      for (std::size_t place = start; place < end; place += 2) {
        const std::size_t lane = (place - start) / 2 % layer.lanes;
        if (place < part.turned()) {
          AsBefore& as = as_before[(place - start) / 2];
          if (tokens.rotation) code_pair<true>(lane, place, as);
          else code_pair<false>(lane, place, as);
        } else {
          code_single(lane, place);
          if (place + 1 < end) code_single(lane, place + 1);
        }
      }
      update_energy(std::int32_t(end - start));
    }
    for (std::size_t t = 0; t < n; ++t) tokens.energy[tokens.at[tile.start + t]] = energy[t];
    if (!std::is_const_v<T>) move_numbers();
    return coder.end(tokens, tile, layer.lanes);
  }

 private:
  using Number = std::remove_const_t<T>;
  // Whether numbers are known, and their pairs are looked for before RoPE.
  static constexpr bool kUnturns = std::is_const_v<T> && sizeof(T) == 2;
  const Model& model;
  const Layer& layer;
  const Part& part;
  const NumberFormat format;
  const Tokens& tokens;
  const Tile& tile;
  const Block<T>& block;
  Coder& coder;
  UnitInUse& unit;
  const std::int32_t (*const input_sums)[kTile];  // where the unit made them
  const Region& region = layer.region[tile.region];
  const std::size_t n = tile.count, pairs = layer.part[0].heads * layer.part[0].pairs;
  const bool table = layer.table16 || layer.table8;
  const std::uint32_t* const input;
  std::uint32_t *const residual, *const output;

  T* row[kTile];  // each token's numbers, as if of channel 0
  Number* const columns = static_cast<Number*>(tokens.numbers);  // [channels][kTile]
  alignas(64) std::int32_t energy[kTile],
      inverse_energy[kTile], deviation[kTile] = {}, known[kTile];
  std::int32_t entry[kTile];
  std::int16_t* const sine = tokens.turn;
  std::int16_t* const cosine = sine + part.pairs * kTile;
  std::int16_t* const angle = cosine + part.pairs * kTile;
  // The model's own, where there are any.
  float* const own_cosine = tokens.own_turn;
  float* const own_sine = own_cosine + part.pairs * kTile;
  // Of a group's channels, from the first of a block of four on: what other layers say, and where
  // they are expected before they are turned.
  std::size_t from = 0;
  alignas(64) std::int32_t base[kMostGroup + 6][kTile];
  // A matrix unit takes room for its last step.
  alignas(64) std::int32_t expected[kMostGroup + kUnitOutputs][kTile];
  // Of the channel that is coded: Density's `centre` and `m`; of it and the one before it, values;
  // and |z|.
  alignas(64) std::int32_t centre[kTile], narrowness[kTile], xs[kTile], ys[kTile], zs[kTile];
  // Of a pair of the group's channels, which are coded as before RoPE: -1, and a bit each; and
  // which of these were nothing then.
  struct AsBefore {
    alignas(64) std::int32_t chosen[kTile];
    std::uint64_t bits, without;
  };
  AsBefore as_before[kMostGroup / 2];
  // Pairs that are looked for before RoPE: their bits, whether they were found, how they are
  // turned, where they are expected, and their weights, as floats.
  struct SideBySide {
    static constexpr std::size_t kRoom = 4 * kTile;
    alignas(64) std::int32_t number[2][kRoom + W], found[kRoom + W], cosine[kRoom + W],
        sine[kRoom + W], centre[2][kRoom + W], weight[2][kRoom + W];
  };
  SideBySide sought, missed;

  // --- load ------------------------------------------------------------------------------------

  void load_tokens() {
    const std::int16_t* turns[kTile];
    const float* own[kTile];
    for (std::size_t t = 0; t < kTile; ++t) {
      // What is past the last token goes along with it, and is never looked at.
      const std::size_t token = tokens.at[tile.start + std::min(t, n - 1)];
      const std::size_t batch_row = token / tokens.count, column = token % tokens.count;
      row[t] = block.data + std::ptrdiff_t(batch_row) * block.row_stride +
               std::ptrdiff_t(column) * block.token_stride;
      energy[t] = tokens.energy[token];
      entry[t] = tokens.entry[token];
      known[t] = table && entry[t] >= 0 ? -1 : 0;
      turns[t] = tokens.turns + 3 * part.pairs * column;
      if (tokens.rotation) own[t] = tokens.rotation + 2 * part.pairs * column;
    }
    to_columns<W>(turns, 3 * part.pairs, sine);
    if (tokens.rotation) to_columns<W>(own, 2 * part.pairs, own_cosine);
    invert_energy();
  }
  Number* column(std::size_t place) const {
    return columns + std::size_t(part.order[place]) * kTile;
  }
  // Which pair of its head the channel at `place` is of.
  std::size_t pair_of(std::size_t place) const {
    return part.pair_of(std::size_t(part.order[place]));
  }
  ChannelNumbers<T> numbers(std::size_t place) const { return {column(place), n}; }
  // Numbers between the block and `columns`: from those that are known, to those that are read.
  void move_numbers() {
    constexpr std::size_t N = std::max<std::size_t>(16 / sizeof(T), W);
    for (std::size_t h = 0; h < part.heads; ++h) {
      const std::ptrdiff_t head = std::ptrdiff_t(h) * block.head_stride;
      Number* const to = columns + h * part.dim * kTile;
      const std::size_t squares = block.dim_stride == 1 ? part.dim / N * N : 0;
      for (std::size_t d = 0; d < squares; d += N)
        for (std::size_t t = 0; t < n; t += N) {
          Square<Number, int(N)> square;
          for (std::size_t i = 0; i < N; ++i)
            square.load(int(i),
                        std::is_const_v<T> ? row[t + i] + head + d : to + (d + i) * kTile + t);
          square.transpose();
          if constexpr (std::is_const_v<T>) {
            for (std::size_t i = 0; i < N; ++i) square.store(int(i), to + (d + i) * kTile + t);
          } else {
            for (std::size_t i = 0; i < std::min(N, n - t); ++i)
              square.store(int(i), row[t + i] + head + d);
          }
        }
      for (std::size_t d = squares; d < part.dim; ++d)
        for (std::size_t t = 0; t < n; ++t) {
          T& number = row[t][head + std::ptrdiff_t(d) * block.dim_stride];
          if constexpr (std::is_const_v<T>) to[d * kTile + t] = number;
          else number = to[d * kTile + t];
        }
    }
  }

  // --- predict ---------------------------------------------------------------------------------

  // Where the channels from `begin` on are expected; none looks at another one of them.
  void predict(std::size_t begin, std::size_t end) {
    from = begin / 4 * 4;
    const std::size_t last = std::min(up4(end), layer.width);
    if (tokens.products.unit) {
      unit.fetch();
      const std::size_t row = from - 4 * part.first_block();
      multiply_within(row, last - from);
      for (std::size_t c = from; c < last; ++c)
        predict_channel(c, input_sums[row + c - from], region.weight_start[c],
                        region.within_start[c]);
      return;
    }
    const Products& products = tokens.products;
    for (std::size_t b = from / 4; 4 * b < end; ++b) {
      std::int32_t (*const bases)[kTile] = base + 4 * b - from;
      std::int32_t (*const sums)[kTile] = expected + 4 * b - from;
      const auto order = [&](const Order* of) { return products.in_order ? of + b : nullptr; };
      products.of_four(input, region.weight + b * layer.inputs * 4, layer.inputs / 4,
                       layer.inputs * 4, order(region.weight_order), region.weight_start + 4 * b, n,
                       bases);
      products.of_four(residual, region.within + b * layer.blocks * 16, layer.reads[b],
                       layer.blocks * 16, order(region.within_order), region.within_start + 4 * b,
                       n, sums);
      for (std::size_t c = 4 * b; c < std::min(4 * b + 4, last); ++c)
        predict_channel(c, base[c - from], 0, 0);
    }
  }
  // What the layer's own channels say, by a matrix unit.
  void multiply_within(std::size_t row, std::size_t outputs) {
    const std::size_t last_block = (from + outputs - 1) / 4;
    tokens.products.unit->products(residual, tokens.unit_within + row * kUnitGroups * 4,
                                   unit_steps(layer.reads[last_block]), unit_rows(part.blocks()),
                                   outputs, n, expected);
  }
  // From sums of products to fixed point: those with other layers' numbers, and in `expected` those
  // within the layer. To each belongs what it starts with.
  void predict_channel(std::size_t c, const std::int32_t* inputs, std::int32_t inputs_start,
                       std::int32_t within_start) {
    std::int32_t *const bases = base[c - from], *const sums = expected[c - from];
    const I bias = all(region.bias[c]), scale = all(region.weight_scale[c]);
    for (std::size_t t = 0; t < n; t += W)
      store(bases + t,
            clamp(bias + Isa::template scaled<20>(load(inputs + t) + inputs_start, scale), kClamp));
    if (table)
      for (std::size_t t = 0; t < n; ++t)
        if (known[t])
          bases[t] += layer.table16 ? layer.table16[std::size_t(entry[t]) * layer.width + c] * 32
                                    : layer.table8[std::size_t(entry[t]) * layer.width + c] * 4096;
    const I within = all(region.within_scale[c]);
    for (std::size_t t = 0; t < n; t += W)
      store(sums + t,
            clamp(load(bases + t) + Isa::template scaled<20>(load(sums + t) + within_start, within),
                  kClamp));
  }

  // --- code ------------------------------------------------------------------------------------

  const std::int32_t* of_class(const std::int32_t* array, std::size_t size, bool is_known) const {
    return array + (layer.regions * std::size_t(is_known) + tile.region) * size;
  }
  // Density's `m`, from 2^28 / mean deviation.
  I narrow(std::size_t t, I inverse) const {
    return Isa::template product<12>(inverse, load(inverse_energy + t));
  }
  Density<Isa> density(std::size_t place) const {
    const std::size_t c = part.first + place;
    return {model.densities, layer.density[c], format, layer.unit[c]};
  }
  // The channel at `place`, whose `centre` and `narrowness` are set. Tells which numbers are
  // escapes, a bit each.
  std::uint64_t code(std::size_t lane, std::size_t place, std::int32_t* values) {
    return coder.code(lane, density(place), numbers(place), {centre, narrowness}, {values, zs});
  }

  void code_single(std::size_t lane, std::size_t place) {
    const std::size_t c = part.first + place;
    for (std::size_t t = 0; t < n; t += W) {
      I inverse = all(of_class(layer.inverse, layer.width, false)[c]);
      if (table)
        inverse =
            load(known + t) != 0 ? all(of_class(layer.inverse, layer.width, true)[c]) : inverse;
      store(centre + t, load(expected[c - from] + t));
      store(narrowness + t, narrow(t, inverse));
    }
    code(lane, place, xs);
    tally(place, xs);
    for (std::size_t t = 0; t < n; t += W) pass_on(c, t, load(xs + t));
  }

  // Two channels that RoPE turns together. After it, the second is expected where the first tells.
  template <bool rotated>
  __attribute__((noinline)) void code_pair(std::size_t lane, std::size_t place, AsBefore& as) {
    // Of numbers that are known it was asked for all of a group.
    if constexpr (!kUnturns || !rotated) turn_expected<rotated>(place, as);
    const std::size_t c = part.first + place, pair = place / 2;
    const std::size_t p = pair_of(place), all_pairs = pairs * kAngles;
    const std::int16_t *const sines = sine + p * kTile, *const cosines = cosine + p * kTile;
    const auto by_angle = [&](const std::int32_t* array, std::size_t size, std::size_t table_row,
                              std::size_t t) {
      const I turn = widened(angle + p * kTile + t);
      const I plain = Isa::at32(of_class(array, size, false) + table_row * kAngles, turn);
      if (!table) return plain;
      return load(known + t) != 0
                 ? Isa::at32(of_class(array, size, true) + table_row * kAngles, turn)
                 : plain;
    };
    const std::int32_t *const x0 = expected[c - from], *const y0 = expected[c + 1 - from];
    for (std::size_t t = 0; t < n; t += W) {
      I inverse = by_angle(layer.pair_inverse, 2 * all_pairs, 2 * pair, t);
      if (rotated) inverse = load(as.chosen + t) ? own_inverse(c, t) : inverse;
      store(centre + t, load(x0 + t));
      store(narrowness + t, narrow(t, inverse));
    }
    const std::uint64_t escapes = code(lane, place, xs);
    if (const std::uint64_t kept = as.bits & (escapes | as.without); rotated && kept)
      keep_turned(kept, as, place);
    tally(place, xs);
    for (std::size_t t = 0; t < n; t += W) {
      const I slope = by_angle(layer.pair_slope, all_pairs, pair, t);
      const I off = Isa::template scaled<12>(load(xs + t) - load(x0 + t), slope);
      I y = clamp(load(y0 + t) + off, kClamp),
        inverse = by_angle(layer.pair_inverse, 2 * all_pairs, 2 * pair + 1, t);
      if (rotated) {
        const I chosen = load(as.chosen + t);
        y = chosen ? load(y0 + t) : y;
        inverse = chosen ? own_inverse(c + 1, t) : inverse;
      }
      store(centre + t, y);
      store(narrowness + t, narrow(t, inverse));
    }
    code(lane, place + 1, ys);
    tally(place + 1, ys);
    for (std::size_t t = 0; t < n; t += W) {
      const I x = load(xs + t), y = load(ys + t);
      const I sin = widened(sines + t), cos = widened(cosines + t);
      I a = clamp(Isa::turned(x, cos, y, sin), kClamp),
        b = clamp(Isa::turned(y, cos, x, -sin), kClamp);
      if (rotated) {
        const I chosen = load(as.chosen + t);
        a = chosen ? x : a;
        b = chosen ? y : b;
        if constexpr (!std::is_const_v<T>) turn(chosen, place, p, t);
      }
      pass_on(c, t, a);
      pass_on(c + 1, t, b);
    }
  }

  // --- pairs before RoPE -----------------------------------------------------------------------

  // |a b| as a float32, whose bits are in the order of what they stand for.
  static I product_size(Two<I> of) {
    return Base::as_bits(to_float(of.first) * to_float(of.second)) & 0x7fffffff;
  }
  I own_inverse(std::size_t c, std::size_t t) const {
    const I plain = all(of_class(layer.inverse, layer.width, false)[c]);
    if (!table) return plain;
    return load(known + t) != 0 ? all(of_class(layer.inverse, layer.width, true)[c]) : plain;
  }
  // Numbers of 16 bits, zeros above them.
  static I bits_at(const void* numbers, std::size_t t) {
    return widened(static_cast<const std::uint16_t*>(numbers) + t);
  }
  Rotation<Isa> rotation(std::size_t p, std::size_t t) const {
    const auto of = [&](const float* at) { return Base::as_float(load(at + p * kTile + t)); };
    return {{}, of(own_cosine), of(own_sine), tokens.rounds_products};
  }
  // Where the pairs at `place` are expected: after RoPE; or before it, where they stood on a
  // coarser grid then, as far as can be foreseen, and are coded so.
  template <bool rotated>
  void turn_expected(std::size_t place, AsBefore& as) {
    const std::size_t c = part.first + place, p = pair_of(place);
    std::int32_t *const first = expected[c - from], *const second = expected[c + 1 - from];
    as.bits = as.without = 0;
    for (std::size_t t = 0; t < n; t += W) {
      const Two<I> own{load(first + t), load(second + t)};
      Two<I> turned = turned_expected(own, p, t);
      if (rotated) {
        const I size = product_size(own), turned_size = product_size(turned),
                chosen = turned_size < size;
        as.bits |= Isa::below(turned_size, size) << t;
        store(as.chosen + t, chosen);
        turned = {chosen ? own.first : turned.first, chosen ? own.second : turned.second};
      }
      store(first + t, turned.first);
      store(second + t, turned.second);
    }
    if (n < kTile) as.bits &= ~(~std::uint64_t(0) << n);
  }
  Two<I> turned_expected(Two<I> own, std::size_t p, std::size_t t) const {
    const I sin = widened(sine + p * kTile + t), cos = widened(cosine + p * kTile + t);
    return {Isa::turned(own.first, cos, own.second, -sin),
            Isa::turned(own.second, cos, own.first, sin)};
  }
  // Turns the chosen pairs of those at `place`, so that they are as they stand in a cache.
  void turn(I chosen, std::size_t place, std::size_t p, std::size_t t) {
    if constexpr (sizeof(T) == 2) {
      Number *const first = column(place) + t, *const second = column(place + 1) + t;
      const I a = bits_at(first, 0), b = bits_at(second, 0);
      const Two<I> turned = rotation(p, t).turned({a, b});
      Base::store_narrow(first, chosen ? turned.first : a);
      Base::store_narrow(second, chosen ? turned.second : b);
    }
  }

  // Puts what the chosen pairs of channels [start, end) were before RoPE in their place, where they
  // were anything. What is looked for goes side by side, so that it fills vectors.
  void unturn(std::size_t start, std::size_t end) {
    for (std::size_t place = start; place < end;) {
      const std::size_t first = place;
      std::size_t count = 0;
      for (; place < end && count + kTile <= SideBySide::kRoom; place += 2) {
        AsBefore& as = as_before[(place - start) / 2];
        turn_expected<true>(place, as);
        count = gather(as, place, count);
      }
      find(count);
      for (std::size_t i = first, k = 0; i < place; i += 2)
        k = put_back(as_before[(i - start) / 2], i, k);
    }
  }
  static std::uint64_t lanes_of(std::uint64_t bits, std::size_t t) {
    return bits >> t & ~std::uint64_t(0) >> (64 - W);
  }
  // Returns how many are sought with the chosen pairs at `place`.
  std::size_t gather(const AsBefore& as, std::size_t place, std::size_t count) {
    const std::size_t c = part.first + place, p = pair_of(place);
    const F unit = F{} + NumberGrid<Isa>::scale(layer.unit[c]);
    for (std::size_t t = 0; t < n; t += W) {
      const std::uint64_t some = lanes_of(as.bits, t);
      if (!some) continue;
      const auto pack = [&](std::int32_t* to, I v) { Isa::pack(to + count, some, v); };
      pack(sought.number[0], bits_at(column(place), t));
      pack(sought.number[1], bits_at(column(place + 1), t));
      pack(sought.cosine, load(own_cosine + p * kTile + t));
      pack(sought.sine, load(own_sine + p * kTile + t));
      if (layer.table16)
        for (std::size_t i = 0; i < 2; ++i) {
          pack(sought.centre[i], Base::as_bits(to_float(load(expected[c + i - from] + t)) * unit));
          // What is known but for its rounding is likely to be the nearest.
          const I weight = load(known + t) & of_class(layer.inverse, layer.width, true)[c + i];
          pack(sought.weight[i], Base::as_bits(to_float(weight)));
        }
      count += std::size_t(__builtin_popcountll(some));
    }
    return count;
  }
  // Puts the first `count` of those that are sought before RoPE. Most are found at once, and what
  // is missed goes side by side again.
  void find(std::size_t count) {
    std::uint64_t missing[SideBySide::kRoom / W];
    const std::size_t left = find_at_once(count, missing);
    find_missed(left);
    for (std::size_t k = 0, at = 0; at < left; k += W) {
      const std::uint64_t some = missing[k / W];
      const auto put = [&](std::int32_t* to, const std::int32_t* of) {
        store(to + k, load(to + k) | Isa::unpacked(of + at, some));
      };
      put(sought.number[0], missed.number[0]);
      put(sought.number[1], missed.number[1]);
      put(sought.found, missed.found);
      at += std::size_t(__builtin_popcountll(some));
    }
  }
  // Returns how many are missed; `missing`: which of each vector, a bit each. They are 0 for now.
  std::size_t find_at_once(std::size_t count, std::uint64_t* missing) {
    std::size_t left = 0;
    for (std::size_t k = 0; k < count; k += W) {
      const Two<I> pair{load(sought.number[0] + k), load(sought.number[1] + k)};
      const auto in = rotation(sought, k).at_once(pair);
      I found = in.found;
      if (layer.table16) found &= (load(sought.weight[0] + k) | load(sought.weight[1] + k)) == 0;
      store(sought.number[0] + k, found & in.pair.first);
      store(sought.number[1] + k, found & in.pair.second);
      store(sought.found + k, found);
      const std::uint64_t used = ~std::uint64_t(0) >> (64 - std::min<std::size_t>(count - k, W)),
                          some = missing[k / W] = used & ~Isa::below(all(0), found);
      if (!some) continue;
      const auto pack = [&](std::int32_t* to, I v) { Isa::pack(to + left, some, v); };
      pack(missed.number[0], pair.first);
      pack(missed.number[1], pair.second);
      pack(missed.cosine, load(sought.cosine + k));
      pack(missed.sine, load(sought.sine + k));
      if (layer.table16)
        for (std::size_t i = 0; i < 2; ++i) {
          pack(missed.centre[i], load(sought.centre[i] + k));
          pack(missed.weight[i], load(sought.weight[i] + k));
        }
      left += std::size_t(__builtin_popcountll(some));
    }
    return left;
  }
  void find_missed(std::size_t left) {
    for (std::size_t k = 0; k < left; k += W) {
      const auto of = [&](const std::int32_t* at) { return Base::as_float(load(at + k)); };
      Two<F> centre{F{}, F{}}, weight{F{}, F{}};
      if (layer.table16)
        centre = {of(missed.centre[0]), of(missed.centre[1])},
        weight = {of(missed.weight[0]), of(missed.weight[1])};
      const Two<I> pair{load(missed.number[0] + k), load(missed.number[1] + k)};
      const auto in = rotation(missed, k).unturned(
          pair, centre, weight, ~std::uint64_t(0) >> (64 - std::min<std::size_t>(W, left - k)));
      store(missed.number[0] + k, in.found ? in.pair.first : pair.first);
      store(missed.number[1] + k, in.found ? in.pair.second : pair.second);
      store(missed.found + k, in.found);
    }
  }
  Rotation<Isa> rotation(const SideBySide& pairs, std::size_t k) const {
    return {{},
            Base::as_float(load(pairs.cosine + k)),
            Base::as_float(load(pairs.sine + k)),
            tokens.rounds_products};
  }
  // Returns how many of those that were sought are put.
  std::size_t put_back(AsBefore& as, std::size_t place, std::size_t k) {
    for (std::size_t t = 0; t < n; t += W) {
      const std::uint64_t some = lanes_of(as.bits, t);
      if (!some) continue;
      const I chosen = load(as.chosen + t);
      for (std::size_t i = 0; i < 2; ++i) {
        Number* const to = column(place + i) + t;
        Base::store_narrow(to, chosen ? Isa::unpacked(sought.number[i] + k, some) : bits_at(to, 0));
      }
      as.without |= (some & ~Isa::below(all(0), Isa::unpacked(sought.found + k, some))) << t;
      k += std::size_t(__builtin_popcountll(some));
    }
    return k;
  }
  // Pairs whose first number is an escape, a bit each, stay as they are after RoPE.
  void keep_turned(std::uint64_t which, AsBefore& as, std::size_t place) {
    const std::size_t c = part.first + place, p = pair_of(place);
    for (; which; which &= which - 1) {
      const auto t = std::size_t(__builtin_ctzll(which)), start = t / W * W;
      const I here = Base::lanes() == std::int32_t(t - start);
      if constexpr (std::is_const_v<T>) {
        if (!(as.without >> t & 1)) turn(here, place, p, start);
        coder.escape(t, density(place), numbers(place), {centre, narrowness}, {xs, zs});
      }
      std::int32_t* const at[2] = {expected[c - from] + start, expected[c + 1 - from] + start};
      const Two<I> own{load(at[0]), load(at[1])}, turned = turned_expected(own, p, start);
      store(at[0], here ? turned.first : own.first);
      store(at[1], here ? turned.second : own.second);
      as.chosen[t] = 0;
    }
  }

  // --- update ----------------------------------------------------------------------------------

  // What channel c tells the channels and layers after it.
  void pass_on(std::size_t c, std::size_t t, I v) {
    const I r = (v - load(base[c - from] + t) + (1 << (kResidualShift - 1))) >> kResidualShift;
    const I q = Isa::template scaled<28>(v - layer.mean[c], all(layer.input_scale[c]));
    const int shift = int(c % 4) * 8;
    std::uint32_t* const rs = residual + c / 4 * kTile + t;
    std::uint32_t* const qs = output + c / 4 * kTile + t;
    store(rs, (load(rs) & ~(255 << shift)) | ((clamp(r, 127) + 128) << shift));
    store(qs, (load(qs) & ~(255 << shift)) | ((clamp(q, 127) + 128) << shift));
  }

  // What a channel's numbers tell of how far numbers lie from where they are expected.
  void tally(std::size_t place, const std::int32_t* values) {
    for (std::size_t t = 0; t < n; t += W)
      store(deviation + t, load(deviation + t) + min_of(load(zs + t) >> (kZBits - 8), all(2048)));
    if (!coder.counts) return;
    for (std::size_t t = 0; t < n; t += W) {
      const I cell = Density<Isa>::cell_of(
          Density<Isa>::z_of(load(values + t) - load(centre + t), load(narrowness + t)));
      for (std::size_t i = 0; i < std::min<std::size_t>(W, n - t); ++i)
        ++coder.counts[((layer.regions * (known[t + i] != 0) + tile.region) * part.channels() +
                        place) *
                           kCells +
                       std::size_t(cell[i])];
    }
  }

  // The energies of the tokens, after a group of so many channels.
  void update_energy(std::int32_t channels) {
    for (std::size_t t = 0; t < n; t += W) {
      const I e = load(energy + t), off = load(deviation + t) - 256 * channels;
      const I now = e + ((e >> 3) * off >> 12);
      const I found = max_of(min_of(now, all(1 << 16)), all(1 << 8));
      store(deviation + t, all(0));
      // Of a known token rounding is all that is left.
      store(energy + t, layer.table16 ? (load(known + t) != 0 ? e : found) : found);
    }
    invert_energy();
  }
  // 2^24 / energy, rounded down.
  void invert_energy() {
    for (std::size_t t = 0; t < kTile; t += W) {
      const I e = load(energy + t);
      I q = to_int(float(1 << 24) / to_float(e));
      q += (q * e > (1 << 24));
      store(inverse_energy + t, q - ((q + 1) * e <= (1 << 24)));
    }
  }
};

// The table of kernels (kernels.hpp) of one instruction set.
template <class Isa>
struct VectorKernels {
  template <typename T, typename Coder>
  static bool run(const Model& model, const Layer& layer, int which, NumberFormat format,
                  const Tokens& tokens, const Block<T>& block, Coder& coder) {
    const Part& part = layer.part[which];
    UnitInUse unit(layer, part, tokens);
    for (std::size_t i = 0; i < tokens.tiles; ++i) {
      TileCoder<Isa, T, Coder> tile(model, layer, part, format, tokens, i, block, coder, unit);
      if (!tile.run()) return false;
    }
    return true;
  }

  template <typename T>
  static double model(const Model& m, const Layer& layer, int part, NumberFormat format,
                      const Tokens& tokens, const Block<const T>& block, Intervals intervals,
                      std::uint32_t* counts) {
    IntervalRecorder<Isa, const T> coder(intervals, counts, format);
    run(m, layer, part, format, tokens, block, coder);
    return coder.bits;
  }

  template <typename T>
  static bool decode(const Model& m, const Layer& layer, int part, NumberFormat format,
                     const Tokens& tokens, const Block<T>& block, const Coded& coded) {
    NumberDecoder<Isa, T> coder(coded);
    return run(m, layer, part, format, tokens, block, coder);
  }

  static Sampled sample(const std::uint16_t* first, const std::uint16_t* second,
                        const float* cosine, const float* sine, std::size_t count,
                        bool rounds_products) {
    using R = Rotation<Isa>;
    using V = Vectors<Isa>;
    Sampled found{0, 0};
    for (std::size_t t = 0; t < kTile; t += Isa::W) {
      const auto bits = [&](const std::uint16_t* of) { return V::widened(of + t); };
      const R by{
          {}, V::as_float(V::load(cosine + t)), V::as_float(V::load(sine + t)), rounds_products};
      const Two<typename V::I> pair{bits(first), bits(second)};
      const auto product = [](Two<typename V::I> of) {
        return V::as_bits(R::number(of.first) * R::number(of.second)) & 0x7fffffff;
      };
      const typename V::I coarser = (2 << 23) + product(pair), before = product(by.nearest(pair));
      const std::uint64_t there =
          count > t ? ~std::uint64_t(0) >> (64 - std::min<std::size_t>(Isa::W, count - t)) : 0;
      const std::uint64_t telling = Isa::below(coarser, before) & there;
      if (!telling) continue;
      const Two<typename V::F> anywhere = {typename V::F{}, typename V::F{}};
      const auto in = by.unturned(pair, anywhere, anywhere, telling);
      found.telling |= telling << t;
      found.turned |= (telling & Isa::below(V::all(0), in.found)) << t;
    }
    return found;
  }

  static void to_columns(const std::uint32_t* const* rows, std::size_t blocks, std::uint32_t* to) {
    constexpr std::size_t N = Isa::W;
    for (std::size_t t = 0; t < kTile; t += N) {
      // Rows lie anywhere.
      for (std::size_t i = t + N; i < std::min<std::size_t>(t + 2 * N, kTile); ++i)
        for (std::size_t b = 0; b < blocks; b += 16) __builtin_prefetch(rows[i] + b);
      std::size_t b = 0;
      for (; b + N <= blocks; b += N) {
        Square<std::uint32_t, int(N)> square;
        for (std::size_t i = 0; i < N; ++i) square.load(int(i), rows[t + i] + b);
        square.transpose();
        for (std::size_t i = 0; i < N; ++i) square.store(int(i), to + (b + i) * kTile + t);
      }
      for (; b < blocks; ++b)
        for (std::size_t i = t; i < t + N; ++i) to[b * kTile + i] = rows[i][b];
    }
  }
  static void to_rows(const std::uint32_t* from, std::size_t blocks, std::size_t tokens,
                      std::uint32_t* const* rows) {
    constexpr std::size_t N = Isa::W;
    for (std::size_t t = 0; t < tokens; t += N) {
      const std::size_t end = std::min(t + N, tokens);
      std::size_t b = 0;
      for (; b + N <= blocks; b += N) {
        Square<std::uint32_t, int(N)> square;
        for (std::size_t i = 0; i < N; ++i) square.load(int(i), from + (b + i) * kTile + t);
        square.transpose();
        for (std::size_t i = t; i < end; ++i) square.store(int(i - t), rows[i] + b);
      }
      for (; b < blocks; ++b)
        for (std::size_t i = t; i < end; ++i) rows[i][b] = from[b * kTile + i];
    }
  }

  static constexpr Kernels kernels(const Products& products) {
    return {products,
            to_columns,
            to_rows,
            model<std::uint8_t>,
            model<std::uint16_t>,
            decode<std::uint8_t>,
            decode<std::uint16_t>,
            sample,
            encode<Isa>};
  }
};

}  // namespace
}  // namespace kvzip::predictive
