// What Python sees of the predictive codec: a model made from a profile, and the state of a token
// range whose layers are coded one after the other. Sizes are checked and memory allocated here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "native/bindings.hpp"
#include "predictive/kernels.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::predictive {
namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Numbers = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

// An array's numbers where they lie; the caller keeps the array.
template <typename T>
const T* look(const Array<T>& array, std::size_t size, const char* what) {
  if (array.size() != size) throw std::invalid_argument(std::string(what) + " has another size");
  return array.data();
}

template <typename T>
std::vector<T> take(const Array<T>& array, std::size_t size, const char* what) {
  const T* from = look(array, size, what);
  return std::vector<T>(from, from + size);
}

void within_bounds(const std::int32_t* v, std::size_t n, std::int32_t low, std::int32_t high,
                   const char* what) {
  for (std::size_t i = 0; i < n; ++i)
    if (v[i] < low || v[i] > high) throw std::invalid_argument(std::string(what) + " is out of bounds");
}

// -128 times the sum of what each output of a blocked matrix [blocks][groups][4][4] reads; of the
// triangular one up to and with the block itself.
std::vector<std::int32_t> starts(const std::int8_t* matrix, std::size_t blocks, std::size_t groups,
                                 bool triangular) {
  std::vector<std::int32_t> sums(4 * blocks);
  for (std::size_t b = 0; b < blocks; ++b)
    for (std::size_t g = 0; g < (triangular ? b + 1 : groups); ++g)
      for (std::size_t i = 0; i < 16; ++i) sums[4 * b + i / 4] -= 128 * matrix[(b * groups + g) * 16 + i];
  return sums;
}

// Densities for a format of so many numbers, see kernels.hpp.
struct DensityTables {
  Densities of{};
  std::vector<std::int32_t> from, rise;
  std::vector<float> cell, slope;

  DensityTables(const std::uint32_t* shares, std::size_t shapes, std::uint32_t numbers) {
    of.half = std::int32_t((kCdf - numbers) / 2);
    for (std::size_t s = 0; s < shapes; ++s) {
      std::int32_t edge[kCells + 1];
      for (int i = 0; i <= kCells; ++i)
        edge[i] = std::int32_t(std::uint64_t(shares[s * (kCells + 1) + std::size_t(i)]) * std::uint64_t(of.half) >> 23);
      for (int i = 0; i < kCells; ++i) {
        from.push_back(edge[i]);
        rise.push_back(edge[i + 1] - edge[i]);
      }
      double at[65];
      for (int i = 0; i <= 64; ++i) {
        const double tail = std::ldexp(1 + (i & 3) / 4.0, 7 + i / 4), share = of.half - tail;
        const int c = int(std::upper_bound(edge, edge + kCells, share) - edge) - 1;
        at[i] = c < 0 ? 0 : c + std::min(1.0, (share - edge[c]) / std::max(1, edge[c + 1] - edge[c]));
      }
      for (int i = 0; i < 64; ++i) {
        cell.push_back(float(at[i]));
        slope.push_back(float(at[i + 1] - at[i]));
      }
    }
    of.from = from.data();
    of.rise = rise.data();
    of.cell = cell.data();
    of.slope = slope.data();
  }
};

struct LayerData {
  Layer layer{};
  std::vector<std::size_t> inputs;
  std::vector<Region> regions;
  std::vector<std::int32_t> order[2], inverse, pair_inverse, pair_slope, mean, input_scale, centre_bias,
      centre_start;
  std::vector<std::vector<std::int32_t>> start;
  std::vector<std::uint64_t> step;
  std::vector<std::int8_t> unit;
  std::vector<std::uint8_t> density;
  std::size_t known = 0;  // rows of the layer's token table
  // Big arrays stay where they are.
  std::vector<Array<std::int8_t>> kept8;
  std::vector<Array<std::int16_t>> kept16;
  std::vector<Array<std::int32_t>> kept32;
};

class PredictiveModel {
 public:
  PredictiveModel(const PredictiveModel&) = delete;
  PredictiveModel(const Array<std::uint32_t>& densities, const Array<std::int16_t>& sine) {
    if (densities.ndim() != 2 || densities.shape(0) == 0 || densities.shape(0) > 256)
      throw std::invalid_argument("densities have another shape");
    shapes_ = densities.shape(0);
    const std::uint32_t* d = look(densities, shapes_ * (kCells + 1), "densities");
    for (std::size_t s = 0; s < shapes_; ++s, d += kCells + 1) {
      bool good = d[0] == 0 && d[kCells] == kCdf / 2;
      for (int i = 0; i < kCells; ++i) good = good && d[i] <= d[i + 1] && d[i + 1] - d[i] < 1u << 20;
      if (!good) throw std::invalid_argument("a density does not rise evenly from 0 to a half");
    }
    for (int wide = 0; wide < 2; ++wide)
      tables_.push_back(std::make_unique<DensityTables>(densities.data(), shapes_, wide ? 65536 : 256));
    sine_ = take(sine, 4096, "sine");
    for (std::int16_t s : sine_)
      if (s < -(1 << 14) || s > 1 << 14) throw std::invalid_argument("a sine is out of bounds");
  }

  void add_layer(const std::vector<std::size_t>& inputs, const std::vector<std::size_t>& k_shape,
                 const std::vector<std::size_t>& v_shape, const Array<std::int32_t>& order,
                 const Array<std::uint64_t>& step, const Array<std::int8_t>& unit,
                 const Array<std::int32_t>& mean, const Array<std::int32_t>& input_scale,
                 const Array<std::int32_t>& bias, const Array<std::int8_t>& weight,
                 const Array<std::int32_t>& weight_scale, const Array<std::int8_t>& within,
                 const Array<std::int32_t>& within_scale, const Array<std::uint8_t>& density,
                 const Array<std::int32_t>& inverse, const Array<std::int32_t>& pair_inverse,
                 const Array<std::int32_t>& pair_slope, const std::optional<Array<std::int8_t>>& centre,
                 const std::optional<Array<std::int32_t>>& centre_bias,
                 const std::optional<Array<std::int16_t>>& table16,
                 const std::optional<Array<std::int8_t>>& table8) {
    auto data = std::make_unique<LayerData>();
    Layer& layer = data->layer;
    if (k_shape.size() != 2 || v_shape.size() != 2) throw std::invalid_argument("shapes");
    const std::size_t n[2] = {k_shape[0] * k_shape[1], v_shape[0] * v_shape[1]};
    layer.width = n[0] + n[1];
    if (std::max({layer.width, k_shape[0], k_shape[1], v_shape[0], v_shape[1]}) > 1u << 16)
      throw std::invalid_argument("more than 65,536 channels in a layer");
    layer.blocks = up4(layer.width) / 4;
    const std::size_t pairs = step.size();
    if (2 * pairs > k_shape[1]) throw std::invalid_argument("more pairs than dimensions");
    data->inputs = inputs;
    for (std::size_t l : inputs) {
      if (l >= layers_.size()) throw std::invalid_argument("an input is no earlier layer");
      layer.inputs += up4(layers_[l]->layer.width);
      last_use_[l] = layers_.size();
    }
    // Sums of products of a byte and a weight must fit 32 bits.
    if (layer.inputs > 1u << 16) throw std::invalid_argument("more than 65,536 inputs");
    layer.regions = bias.ndim() == 2 ? bias.shape(0) : 0;
    if (layer.regions < 1 || layer.regions > 256) throw std::invalid_argument("1 to 256 regions");
    const std::size_t all = layer.regions * layer.width;
    const std::int32_t *biases = look(bias, all, "bias"), *scales = look(weight_scale, all, "weight_scale"),
                       *within_scales = look(within_scale, all, "within_scale");
    const std::size_t size = layer.blocks * layer.inputs * 4, triangle = layer.blocks * layer.blocks * 16;
    const std::int8_t *weights = look(weight, layer.regions * size, "weight"),
                      *withins = look(within, layer.regions * triangle, "within");
    data->kept32 = {bias, weight_scale, within_scale};
    data->kept8 = {weight, within};
    for (std::size_t r = 0; r < layer.regions; ++r) {
      data->start.push_back(starts(weights + r * size, layer.blocks, layer.inputs / 4, false));
      data->start.push_back(starts(withins + r * triangle, layer.blocks, layer.blocks, true));
      data->regions.push_back({biases + r * layer.width, weights + r * size, scales + r * layer.width,
                               withins + r * triangle, within_scales + r * layer.width,
                               data->start[2 * r].data(), data->start[2 * r + 1].data()});
    }
    layer.region = data->regions.data();
    if (layer.regions > 1) {
      if (!centre || !centre_bias) throw std::invalid_argument("regions without centres");
      const std::size_t blocks = up4(layer.regions) / 4;
      layer.centre = look(*centre, blocks * layer.inputs * 4, "centre");
      data->kept8.push_back(*centre);
      data->centre_bias = take(*centre_bias, layer.regions, "centre_bias");
      within_bounds(data->centre_bias.data(), layer.regions, -(1 << 30), 1 << 30, "centre_bias");
      data->centre_start = starts(layer.centre, blocks, layer.inputs / 4, false);
      layer.centre_bias = data->centre_bias.data();
    }
    const std::vector<std::int32_t> ordered = take(order, layer.width, "order");
    for (int p = 0; p < 2; ++p) {
      data->order[p].assign(ordered.begin() + std::ptrdiff_t(p ? n[0] : 0),
                            ordered.begin() + std::ptrdiff_t(p ? layer.width : n[0]));
      std::vector<bool> seen(n[p]);
      for (std::int32_t c : data->order[p]) {
        if (c < 0 || std::size_t(c) >= n[p] || seen[std::size_t(c)])
          throw std::invalid_argument("order is no permutation");
        seen[std::size_t(c)] = true;
      }
    }
    data->step = take(step, pairs, "step");
    data->unit = take(unit, layer.width, "unit");
    data->mean = take(mean, layer.width, "mean");
    data->input_scale = take(input_scale, layer.width, "input_scale");
    data->density = take(density, layer.width, "density");
    for (std::uint8_t d : data->density)
      if (d >= shapes_) throw std::invalid_argument("no such density");
    if (table16 && table8) throw std::invalid_argument("two token tables");
    if (table16 || table8) {
      const std::size_t rows = table16 ? table16->size() : table8->size();
      if (rows % std::max<std::size_t>(layer.width, 1)) throw std::invalid_argument("a token table of another size");
      data->known = rows / std::max<std::size_t>(layer.width, 1);
      if (table16) data->kept16.push_back(*table16);
      if (table8) data->kept8.push_back(*table8);
      layer.table16 = table16 ? table16->data() : nullptr;
      layer.table8 = table8 ? table8->data() : nullptr;
      tokens_ = std::max(tokens_, data->known);
    }
    const std::size_t classes = layer.regions * (table16 || table8 ? 2 : 1);
    data->inverse = take(inverse, classes * layer.width, "inverse");
    data->pair_inverse = take(pair_inverse, classes * k_shape[0] * pairs * 2 * kAngles, "pair_inverse");
    data->pair_slope = take(pair_slope, classes * k_shape[0] * pairs * kAngles, "pair_slope");
    within_bounds(data->inverse.data(), data->inverse.size(), 1, 1 << 26, "an inverse");
    within_bounds(data->pair_inverse.data(), data->pair_inverse.size(), 1, 1 << 26, "an inverse");
    for (int p = 0; p < 2; ++p) {
      Part& part = layer.part[p];
      part.heads = p ? v_shape[0] : k_shape[0];
      part.dim = p ? v_shape[1] : k_shape[1];
      part.pairs = p ? 0 : pairs;
      part.first = p ? n[0] : 0;
      part.order = data->order[p].data();
      part.step = data->step.data();
    }
    layer.unit = data->unit.data();
    layer.mean = data->mean.data();
    layer.input_scale = data->input_scale.data();
    layer.density = data->density.data();
    layer.inverse = data->inverse.data();
    layer.pair_inverse = data->pair_inverse.data();
    layer.pair_slope = data->pair_slope.data();
    layers_.push_back(std::move(data));
  }

  const LayerData& layer(std::size_t i) const {
    if (i >= layers_.size()) throw std::invalid_argument("the profile has no such layer");
    return *layers_[i];
  }
  // The last layer that looks at layer i.
  std::size_t last_use(std::size_t i) const {
    const auto found = last_use_.find(i);
    return found == last_use_.end() ? 0 : found->second;
  }
  Model model(Form form) const { return {tables_[form.bits() == 16]->of, sine_.data()}; }
  std::size_t tokens() const { return tokens_; }

 private:
  std::size_t shapes_, tokens_ = 0;
  std::vector<std::unique_ptr<DensityTables>> tables_;  // of 8 bits, of 16 bits
  std::vector<std::int16_t> sine_;
  std::vector<std::unique_ptr<LayerData>> layers_;
  std::map<std::size_t, std::size_t> last_use_;
};

// Codes the parts of a token range in their order: keys, values, then the next layer. `entries`:
// [rows*count] place of each token in the model's tables, or -1.
class PredictiveChain {
 public:
  PredictiveChain(const PredictiveModel& model, std::size_t rows, std::size_t count,
                  std::uint64_t position, int exponent_bits, int mantissa_bits,
                  const Array<std::int32_t>& entries)
      : model_(model), form_{exponent_bits, mantissa_bits}, total_(rows * count),
        entries_(take(entries, rows * count, "entries")), energy_(total_, kOne), entry_(total_), at_(total_) {
    if (form_.bits() != 8 && form_.bits() != 16) throw std::invalid_argument("not 8 or 16 bits");
    if (total_ > 1u << 30) throw std::invalid_argument("too many tokens in a block");
    for (std::int32_t e : entries_)
      if (e < -1) throw std::invalid_argument("no such token");
    tokens_.rows = rows;
    tokens_.count = count;
    tokens_.position = position;
    tokens_.energy = energy_.data();
    tokens_.entry = entry_.data();
    tokens_.at = at_.data();
  }

  // The bytes of the next part.
  template <typename T>
  nb::bytes encode(std::size_t i, int part, const Numbers<const T>& array) {
    std::vector<std::uint32_t> words;
    std::uint64_t states[kLanes];
    std::size_t n = 0;
    const Block<const T> in = block<const T>(i, part, array);
    {
      nb::gil_scoped_release released;
      const Intervals intervals = work<T>(i, part, in, array.size(), nullptr);
      words.resize(array.size() + 1);
      const Part& p = model_.layer(i).layer.part[part];
      n = kvzip::predictive::encode(tokens_, p.heads * p.dim, intervals, words.data() + words.size(), states);
    }
    std::string out(8 * kLanes + 4 * n, '\0');
    std::memcpy(out.data(), states, sizeof states);
    std::memcpy(out.data() + sizeof states, words.data() + words.size() - n, 4 * n);
    return nb::bytes(out.data(), out.size());
  }

  // How often each cell of |z| occurs, [classes][channels][kCells] in coding order, and the ideal
  // code length in bits.
  template <typename T>
  nb::tuple measure(std::size_t i, int part, const Numbers<const T>& array) {
    const Block<const T> in = block<const T>(i, part, array);
    const Layer& layer = model_.layer(i).layer;
    const std::size_t channels = layer.part[part].heads * layer.part[part].dim;
    const std::size_t classes = layer.regions * (layer.table16 || layer.table8 ? 2 : 1);
    auto* counts = new std::uint32_t[classes * channels * kCells]();
    nb::capsule owner(counts, [](void* p) noexcept { delete[] static_cast<std::uint32_t*>(p); });
    double bits = 0;
    {
      nb::gil_scoped_release released;
      const Intervals intervals = work<T>(i, part, in, array.size(), counts);
      for (std::size_t j = 0; j < array.size(); ++j) bits += kCdfBits - std::log2(double(intervals.size[j]));
    }
    return nb::make_tuple(
        nb::ndarray<nb::numpy, std::uint32_t>(counts, {classes, channels, std::size_t(kCells)}, owner), bits);
  }

  // The numbers are known already; only what follows is to be predicted from them.
  template <typename T>
  void skip(std::size_t i, int part, const Numbers<const T>& array) {
    const Block<const T> in = block<const T>(i, part, array);
    nb::gil_scoped_release released;
    work<T>(i, part, in, array.size(), nullptr);
  }

  template <typename T>
  void decode(std::size_t i, int part, const Array<std::uint8_t>& bytes, const Numbers<T>& array) {
    const Block<T> out = block<T>(i, part, array);
    if (bytes.size() < 8 * kLanes || bytes.size() % 4) throw std::invalid_argument("cut short");
    bool good;
    {
      nb::gil_scoped_release released;
      begin(i, part);
      std::uint64_t states[kLanes];
      std::memcpy(states, bytes.data(), sizeof states);
      const std::uint8_t *words = bytes.data() + sizeof states, *end = bytes.data() + bytes.size();
      const Layer& layer = model_.layer(i).layer;
      if constexpr (sizeof(T) == 1)
        good = kernels().decode8(model_.model(form_), layer, part, form_, tokens_, out, states, words, end);
      else
        good = kernels().decode16(model_.model(form_), layer, part, form_, tokens_, out, states, words, end);
      this->end(i, part);
    }
    if (!good) throw std::invalid_argument("its words do not fit");
  }

 private:
  template <typename T>
  Block<T> block(std::size_t i, int part, const Numbers<T>& array) {
    if (part != 0 && part != 1) throw std::invalid_argument("neither keys nor values");
    const Part& p = model_.layer(i).layer.part[part];
    if (array.shape(0) != tokens_.rows || array.shape(1) != p.heads ||
        array.shape(2) != tokens_.count || array.shape(3) != p.dim ||
        8 * int(sizeof(T)) != form_.bits())
      throw std::invalid_argument("a block of another shape or dtype");
    if (i != next_ / 2 || part != int(next_ % 2)) throw std::invalid_argument("a part out of turn");
    ++next_;
    return {array.data(), array.stride(0), array.stride(1), array.stride(2), array.stride(3)};
  }

  template <typename T>
  Intervals work(std::size_t i, int part, const Block<const T>& in, std::size_t size, std::uint32_t* counts) {
    begin(i, part);
    intervals_.resize(2 * (size + kTile));
    const Intervals intervals{intervals_.data(), intervals_.data() + size + kTile};
    const Layer& layer = model_.layer(i).layer;
    if constexpr (sizeof(T) == 1)
      kernels().model8(model_.model(form_), layer, part, form_, tokens_, in, intervals, counts);
    else
      kernels().model16(model_.model(form_), layer, part, form_, tokens_, in, intervals, counts);
    end(i, part);
    return intervals;
  }

  // The input of tile i: a word of 4 bytes for each group of inputs and token.
  void pack(const LayerData& data, const Tile& tile, std::uint32_t* to) {
    const std::size_t groups = data.layer.inputs / 4;
    std::size_t g = 0;
    for (std::size_t l : data.inputs) {
      const std::size_t blocks = model_.layer(l).layer.blocks;
      const std::uint32_t* from = inputs_.at(l).data();
      for (std::size_t t = 0; t < kTile; ++t) {
        const std::uint32_t* row = from + at_[tile.start + std::min<std::size_t>(t, tile.count - 1)] * blocks;
        for (std::size_t b = 0; b < blocks; ++b) to[(g + b) * kTile + t] = row[b];
      }
      g += blocks;
    }
    (void)groups;
  }

  void cut(std::size_t start, std::size_t count, std::uint32_t region) {
    for (std::size_t i = 0; i < count; i += kTile)
      tiles_.push_back({std::uint32_t(start + i), std::uint32_t(std::min<std::size_t>(kTile, count - i)), region});
  }

  void begin(std::size_t i, int part) {
    if (part == 1) return;
    const LayerData& data = model_.layer(i);
    const Layer& layer = data.layer;
    const std::size_t size = layer.inputs / 4 * kTile;
    tiles_.clear();
    std::iota(at_.begin(), at_.end(), 0);
    if (layer.regions == 1) {
      cut(0, total_, 0);
    } else {
      std::vector<std::uint8_t> region(total_);
      std::vector<std::uint32_t> packed(size);
      for (std::size_t t0 = 0; t0 < total_; t0 += kTile) {
        const std::size_t n = std::min<std::size_t>(kTile, total_ - t0);
        pack(data, {std::uint32_t(t0), std::uint32_t(n), 0}, packed.data());
        std::int32_t best[kTile];
        for (std::size_t r = 0; r < layer.regions; r += 4) {
          alignas(64) std::int32_t sums[4][kTile];
          kernels().products(packed.data(), layer.centre + r * layer.inputs, layer.inputs / 4,
                             data.centre_start.data() + r, n, sums);
          for (std::size_t o = 0; o < std::min<std::size_t>(4, layer.regions - r); ++o)
            for (std::size_t t = 0; t < n; ++t) {
              const std::int32_t score = sums[o][t] + layer.centre_bias[r + o];
              if ((r == 0 && o == 0) || score > best[t]) {
                best[t] = score;
                region[t0 + t] = std::uint8_t(r + o);
              }
            }
        }
      }
      std::stable_sort(at_.begin(), at_.end(),
                       [&](std::uint32_t a, std::uint32_t b) { return region[a] < region[b]; });
      for (std::size_t start = 0, end; start < total_; start = end) {
        const std::uint8_t r = region[at_[start]];
        for (end = start; end < total_ && region[at_[end]] == r;) ++end;
        cut(start, end - start, r);
      }
    }
    packed_.resize(tiles_.size() * size);
    for (std::size_t t = 0; t < tiles_.size(); ++t) pack(data, tiles_[t], packed_.data() + t * size);
    residual_.assign(tiles_.size() * layer.blocks * kTile, 0x80808080u);
    output_.assign(tiles_.size() * layer.blocks * kTile, 0x80808080u);
    turn_.resize(3 * layer.part[0].pairs * kTile);
    for (std::size_t t = 0; t < total_; ++t)
      entry_[t] = entries_[t] < std::int64_t(data.known) ? entries_[t] : -1;
    tokens_.tiles = tiles_.size();
    tokens_.tile = tiles_.data();
    tokens_.input = packed_.data();
    tokens_.residual = residual_.data();
    tokens_.output = output_.data();
    tokens_.turn = turn_.data();
  }

  void end(std::size_t i, int part) {
    if (part == 0) return;
    if (model_.last_use(i) > i) {
      const std::size_t blocks = model_.layer(i).layer.blocks;
      std::vector<std::uint32_t>& rows = inputs_[i];
      rows.resize(total_ * blocks);
      for (std::size_t n = 0; n < tiles_.size(); ++n)
        for (std::size_t t = 0; t < tiles_[n].count; ++t) {
          const std::size_t token = at_[tiles_[n].start + t];
          for (std::size_t b = 0; b < blocks; ++b)
            rows[token * blocks + b] = output_[(n * blocks + b) * kTile + t];
        }
    }
    for (auto it = inputs_.begin(); it != inputs_.end();)
      it = model_.last_use(it->first) <= i ? inputs_.erase(it) : std::next(it);
  }

  const PredictiveModel& model_;
  Form form_;
  std::size_t total_, next_ = 0;
  Tokens tokens_{};
  std::vector<std::int32_t> entries_, energy_, entry_;
  std::vector<std::uint32_t> at_, packed_, residual_, output_, intervals_;
  std::vector<std::int16_t> turn_;
  std::vector<Tile> tiles_;
  std::map<std::size_t, std::vector<std::uint32_t>> inputs_;  // [tokens][blocks] of layers still needed
};

}  // namespace

void bind(nb::module_& m) {
  nb::class_<PredictiveModel>(m, "PredictiveModel")
      .def(nb::init<const Array<std::uint32_t>&, const Array<std::int16_t>&>(), "densities"_a, "sine"_a)
      .def("add_layer", &PredictiveModel::add_layer, "inputs"_a, "k_shape"_a, "v_shape"_a, "order"_a,
           "step"_a, "unit"_a, "mean"_a, "input_scale"_a, "bias"_a, "weight"_a, "weight_scale"_a,
           "within"_a, "within_scale"_a, "density"_a, "inverse"_a, "pair_inverse"_a, "pair_slope"_a,
           "centre"_a.none(), "centre_bias"_a.none(), "table16"_a.none(), "table8"_a.none());
  nb::class_<PredictiveChain>(m, "PredictiveChain")
      .def(nb::init<const PredictiveModel&, std::size_t, std::size_t, std::uint64_t, int, int,
                    const Array<std::int32_t>&>(),
           "model"_a, "rows"_a, "count"_a, "position"_a, "exponent_bits"_a, "mantissa_bits"_a,
           "entries"_a, nb::keep_alive<1, 2>())
      .def("encode", &PredictiveChain::encode<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("encode", &PredictiveChain::encode<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("measure", &PredictiveChain::measure<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("measure", &PredictiveChain::measure<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("skip", &PredictiveChain::skip<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("skip", &PredictiveChain::skip<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("decode", &PredictiveChain::decode<std::uint8_t>, "layer"_a, "part"_a, "data"_a, "out"_a)
      .def("decode", &PredictiveChain::decode<std::uint16_t>, "layer"_a, "part"_a, "data"_a, "out"_a);
}

}  // namespace kvzip::predictive
