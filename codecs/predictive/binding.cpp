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

template <typename T>
std::vector<T> take(const Array<T>& array, std::size_t size, const char* what) {
  if (array.size() != size) throw std::invalid_argument(std::string(what) + " has another size");
  return std::vector<T>(array.data(), array.data() + size);
}

std::size_t up64(std::size_t n) { return (n + 63) / 64 * 64; }

// 128 times the sum of each row: what the 128 added to each input comes to.
std::vector<std::int32_t> row_sums(const std::vector<std::int8_t>& matrix, std::size_t rows) {
  std::vector<std::int32_t> sums(rows);
  const std::size_t length = rows ? matrix.size() / rows : 0;
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t i = 0; i < length; ++i) sums[r] += 128 * matrix[r * length + i];
  return sums;
}

struct LayerData {
  Layer layer{};
  std::vector<std::size_t> inputs;
  std::vector<std::int32_t> order[2], scale[2], pair_scale[2], pair_slope[2];
  std::vector<std::uint64_t> step[2];
  std::vector<std::int8_t> unit, weight, within;
  std::vector<std::int32_t> bias, weight_sum, weight_scale, within_sum, within_scale, mean,
      input_scale;
  std::vector<std::uint8_t> density;
  std::vector<std::int16_t> table;  // [table's tokens][width], empty: none
};

class PredictiveModel {
 public:
  PredictiveModel(const PredictiveModel&) = delete;
  PredictiveModel(const Array<std::uint32_t>& densities, const Array<std::int16_t>& sine) {
    if (densities.ndim() != 2 || densities.shape(0) == 0)
      throw std::invalid_argument("densities have another shape");
    densities_ = take(densities, densities.shape(0) * (kCells + 1), "densities");
    for (std::size_t i = 0; i < densities_.size(); ++i) {
      const bool first = i % (kCells + 1) == 0, last = i % (kCells + 1) == kCells;
      if ((first && densities_[i] != 0) || (last && densities_[i] != kCdf / 2) ||
          (!first && densities_[i] < densities_[i - 1]))
        throw std::invalid_argument("a density does not rise from 0 to a half");
    }
    sine_ = take(sine, 4096, "sine");
  }

  void add_layer(const std::vector<std::size_t>& inputs, std::vector<std::size_t> k_shape,
                 std::vector<std::size_t> v_shape, const Array<std::int32_t>& order,
                 const Array<std::uint64_t>& step, const Array<std::int8_t>& unit,
                 const Array<std::int32_t>& bias, const Array<std::int8_t>& weight,
                 const Array<std::int32_t>& weight_scale, const Array<std::int8_t>& within,
                 const Array<std::int32_t>& within_scale, const Array<std::int32_t>& mean,
                 const Array<std::int32_t>& input_scale, const Array<std::uint8_t>& density,
                 const Array<std::int32_t>& scale, const Array<std::int32_t>& pair_scale,
                 const Array<std::int32_t>& pair_slope,
                 const std::optional<Array<std::int16_t>>& table) {
    auto data = std::make_unique<LayerData>();
    Layer& layer = data->layer;
    if (k_shape.size() != 2 || v_shape.size() != 2) throw std::invalid_argument("shapes");
    const std::size_t n[2] = {k_shape[0] * k_shape[1], v_shape[0] * v_shape[1]};
    layer.width = n[0] + n[1];
    if (layer.width > 1u << 16) throw std::invalid_argument("more than 65,536 channels in a layer");
    const std::size_t pairs = step.size();
    if (2 * pairs > k_shape[1]) throw std::invalid_argument("more pairs than dimensions");
    data->inputs = inputs;
    std::size_t columns = 0;
    for (std::size_t l : inputs) {
      if (l >= layers_.size()) throw std::invalid_argument("an input is no earlier layer");
      columns += layers_[l]->layer.width;
    }
    layer.inputs = up64(columns);
    layer.row = up64(layer.width);
    const std::vector<std::int32_t> all = take(order, layer.width, "order");
    for (int p = 0; p < 2; ++p) {
      data->order[p].assign(all.begin() + std::ptrdiff_t(p ? n[0] : 0),
                            all.begin() + std::ptrdiff_t(p ? layer.width : n[0]));
      std::vector<bool> seen(n[p]);
      for (std::int32_t c : data->order[p]) {
        if (c < 0 || std::size_t(c) >= n[p] || seen[std::size_t(c)])
          throw std::invalid_argument("order is no permutation");
        seen[std::size_t(c)] = true;
      }
    }
    data->step[0] = take(step, pairs, "step");
    data->unit = take(unit, layer.width, "unit");
    data->bias = take(bias, layer.width, "bias");
    data->weight = take(weight, layer.width * layer.inputs, "weight");
    data->weight_sum = row_sums(data->weight, layer.width);
    data->weight_scale = take(weight_scale, layer.width, "weight_scale");
    data->within = take(within, layer.width * layer.row, "within");
    data->within_sum = row_sums(data->within, layer.width);
    data->within_scale = take(within_scale, layer.width, "within_scale");
    data->mean = take(mean, layer.width, "mean");
    data->input_scale = take(input_scale, layer.width, "input_scale");
    data->density = take(density, layer.width, "density");
    for (std::uint8_t d : data->density)
      if (d >= densities_.size() / (kCells + 1)) throw std::invalid_argument("no such density");
    const std::vector<std::int32_t> scales = take(scale, 2 * layer.width, "scale");
    for (int known = 0; known < 2; ++known)
      for (int p = 0; p < 2; ++p) {
        const auto from = scales.begin() + std::ptrdiff_t(known * layer.width + (p ? n[0] : 0));
        data->scale[p].insert(data->scale[p].end(), from, from + std::ptrdiff_t(n[p]));
      }
    data->pair_scale[0] = take(pair_scale, 2 * k_shape[0] * pairs * kAngles * 2, "pair_scale");
    data->pair_slope[0] = take(pair_slope, 2 * k_shape[0] * pairs * kAngles, "pair_slope");
    for (const std::vector<std::int32_t>* s : {&scales, const_cast<const std::vector<std::int32_t>*>(&data->pair_scale[0])})
      for (std::int32_t v : *s)
        if (v < 1 || v > 1 << 26) throw std::invalid_argument("a scale is out of bounds");
    for (std::int32_t v : data->pair_slope[0])
      if (v < -kClamp || v > kClamp) throw std::invalid_argument("a slope is out of bounds");
    if (table) {
      if (table->ndim() != 2) throw std::invalid_argument("a token table of another shape");
      if (!tokens_) tokens_ = table->shape(0);
      data->table = take(*table, *tokens_ * layer.width, "a token table");
    }
    for (int p = 0; p < 2; ++p) {
      Part& part = layer.part[p];
      part.heads = p ? v_shape[0] : k_shape[0];
      part.dim = p ? v_shape[1] : k_shape[1];
      part.pairs = p ? 0 : pairs;
      part.first = p ? n[0] : 0;
      part.order = data->order[p].data();
      part.scale = data->scale[p].data();
      part.pair_scale = data->pair_scale[p].data();
      part.pair_slope = data->pair_slope[p].data();
      part.step = data->step[p].data();
    }
    layer.unit = data->unit.data();
    layer.bias = data->bias.data();
    layer.weight = data->weight.data();
    layer.weight_sum = data->weight_sum.data();
    layer.weight_scale = data->weight_scale.data();
    layer.within = data->within.data();
    layer.within_sum = data->within_sum.data();
    layer.within_scale = data->within_scale.data();
    layer.mean = data->mean.data();
    layer.input_scale = data->input_scale.data();
    layer.density = data->density.data();
    layers_.push_back(std::move(data));
  }

  const LayerData& layer(std::size_t i) const {
    if (i >= layers_.size()) throw std::invalid_argument("the profile has no such layer");
    return *layers_[i];
  }
  Model model() const { return {densities_.data(), sine_.data()}; }
  std::size_t tokens() const { return tokens_.value_or(0); }

 private:
  std::vector<std::uint32_t> densities_;
  std::vector<std::int16_t> sine_;
  std::vector<std::unique_ptr<LayerData>> layers_;
  std::optional<std::size_t> tokens_;  // how many the token tables know
};

// Codes the parts of a token range in their order: keys, values, then the next layer. `entries`:
// [rows*count] place of each token in the model's tables, or -1.
class PredictiveChain {
 public:
  PredictiveChain(const PredictiveModel& model, std::size_t rows, std::size_t count,
                  std::uint64_t position, int exponent_bits, int mantissa_bits,
                  const Array<std::int32_t>& entries)
      : model_(model), form_{exponent_bits, mantissa_bits}, total_(rows * count),
        entries_(take(entries, rows * count, "entries")), known_(total_), energy_(total_, kOne) {
    if (form_.bits() != 8 && form_.bits() != 16) throw std::invalid_argument("not 8 or 16 bits");
    for (std::int32_t e : entries_)
      if (e < -1 || e >= std::int64_t(model.tokens())) throw std::invalid_argument("no such token");
    tokens_.rows = rows;
    tokens_.count = count;
    tokens_.position = position;
    tokens_.known = known_.data();
    tokens_.energy = energy_.data();
  }

  // The bytes of the next part, and its ideal code length in bits.
  template <typename T>
  nb::tuple encode(std::size_t i, int part, const Numbers<const T>& array) {
    const Block<const T> in = block<const T>(i, part, array);
    std::vector<Interval> intervals(array.size());
    std::vector<std::uint8_t> out(8 * kLanes);
    double bits = 0;
    {
      nb::gil_scoped_release released;
      begin(i, part);
      const Layer& layer = model_.layer(i).layer;
      model<T>(model_.model(), layer, part, form_, tokens_, in, intervals.data(), nullptr);
      end(i, part);
      for (const Interval& v : intervals) bits += kCdfBits - std::log2(double(v.size));
      std::vector<std::uint32_t> words(intervals.size());
      std::uint64_t states[kLanes];
      const std::size_t n = kvzip::predictive::encode(intervals.data(), intervals.size(),
                                                      words.data() + words.size(), states);
      std::memcpy(out.data(), states, sizeof states);
      out.resize(8 * kLanes + 4 * n);
      std::memcpy(out.data() + 8 * kLanes, words.data() + words.size() - n, 4 * n);
    }
    return nb::make_tuple(nb::bytes(out.data(), out.size()), bits);
  }

  // How often each cell of |z| occurs, [2][channels][kCells] in coding order, for tokens that the
  // layer's table does not know and for those it does; and the ideal code length in bits.
  template <typename T>
  nb::tuple measure(std::size_t i, int part, const Numbers<const T>& array) {
    const Block<const T> in = block<const T>(i, part, array);
    const Layer& layer = model_.layer(i).layer;
    const std::size_t channels = layer.part[part].heads * layer.part[part].dim;
    std::vector<Interval> intervals(array.size());
    auto* counts = new std::uint32_t[2 * channels * kCells]();
    nb::capsule owner(counts, [](void* p) noexcept { delete[] static_cast<std::uint32_t*>(p); });
    double bits = 0;
    {
      nb::gil_scoped_release released;
      begin(i, part);
      model<T>(model_.model(), layer, part, form_, tokens_, in, intervals.data(), counts);
      end(i, part);
      for (const Interval& v : intervals) bits += kCdfBits - std::log2(double(v.size));
    }
    return nb::make_tuple(
        nb::ndarray<nb::numpy, std::uint32_t>(counts, {2, channels, std::size_t(kCells)}, owner), bits);
  }

  template <typename T>
  void decode(std::size_t i, int part, const Array<std::uint8_t>& bytes, const Numbers<T>& array) {
    const Block<T> out = block<T>(i, part, array);
    if (bytes.size() < 8 * kLanes || bytes.size() % 4) throw std::invalid_argument("cut short");
    bool good;
    {
      nb::gil_scoped_release released;
      begin(i, part);
      good = kvzip::predictive::decode<T>(model_.model(), model_.layer(i).layer, part, form_, tokens_,
                                          out, bytes.data(), bytes.data() + 8 * kLanes,
                                          bytes.size() / 4 - 2 * kLanes);
      end(i, part);
    }
    if (!good) throw std::invalid_argument("its words do not fit");
  }

 private:
  template <typename T>
  Block<T> block(std::size_t i, int part, const Numbers<T>& array) {
    const Part& p = model_.layer(i).layer.part[part];
    if (array.shape(0) != tokens_.rows || array.shape(1) != p.heads ||
        array.shape(2) != tokens_.count || array.shape(3) != p.dim ||
        8 * int(sizeof(T)) != form_.bits())
      throw std::invalid_argument("a block of another shape or dtype");
    if (i != next_ / 2 || part != int(next_ % 2)) throw std::invalid_argument("a part out of turn");
    ++next_;
    return {array.data(), array.stride(0), array.stride(1), array.stride(2), array.stride(3)};
  }

  void begin(std::size_t i, int part) {
    if (part == 1) return;
    const LayerData& data = model_.layer(i);
    const Layer& layer = data.layer;
    input_.assign(total_ * layer.inputs, 128);
    std::size_t column = 0;
    for (std::size_t l : data.inputs) {
      const std::size_t width = model_.layer(l).layer.width;
      const std::vector<std::uint8_t>& from = inputs_.at(l);
      for (std::size_t t = 0; t < total_; ++t)
        std::memcpy(&input_[t * layer.inputs + column], &from[t * width], width);
      column += width;
    }
    base_.resize(total_ * layer.width);
    value_.resize(total_ * layer.width);
    residual_.assign(total_ * layer.row, 128);
    tokens_.base = base_.data();
    tokens_.value = value_.data();
    tokens_.residual = residual_.data();
    predict(layer, input_.data(), total_, base_.data());
    std::fill(known_.begin(), known_.end(), 0);
    if (!data.table.empty())
      for (std::size_t t = 0; t < total_; ++t)
        if (entries_[t] >= 0) {
          known_[t] = 1;
          for (std::size_t c = 0; c < layer.width; ++c)
            base_[t * layer.width + c] +=
                data.table[std::size_t(entries_[t]) * layer.width + c] * (1 << kTableShift);
        }
  }

  void end(std::size_t i, int part) {
    if (part == 0) return;
    const Layer& layer = model_.layer(i).layer;
    std::vector<std::uint8_t>& row = inputs_[i];
    row.resize(total_ * layer.width);
    quantise(layer, value_.data(), total_, row.data(), layer.width);
    // What follows looks back two layers, and to the first.
    if (i >= 3) inputs_.erase(i - 2);
  }

  const PredictiveModel& model_;
  Form form_;
  std::size_t total_, next_ = 0;
  Tokens tokens_{};
  std::vector<std::int32_t> entries_;
  std::vector<std::uint8_t> known_, residual_, input_;
  std::vector<std::int32_t> energy_, base_, value_;
  std::map<std::size_t, std::vector<std::uint8_t>> inputs_;
};

}  // namespace

void bind(nb::module_& m) {
  nb::class_<PredictiveModel>(m, "PredictiveModel")
      .def(nb::init<const Array<std::uint32_t>&, const Array<std::int16_t>&>(), "densities"_a, "sine"_a)
      .def("add_layer", &PredictiveModel::add_layer, "inputs"_a, "k_shape"_a, "v_shape"_a, "order"_a,
           "step"_a, "unit"_a, "bias"_a, "weight"_a, "weight_scale"_a, "within"_a, "within_scale"_a,
           "mean"_a, "input_scale"_a, "density"_a, "scale"_a, "pair_scale"_a, "pair_slope"_a,
           "table"_a.none());
  nb::class_<PredictiveChain>(m, "PredictiveChain")
      .def(nb::init<const PredictiveModel&, std::size_t, std::size_t, std::uint64_t, int, int,
                    const Array<std::int32_t>&>(),
           "model"_a, "rows"_a, "count"_a, "position"_a, "exponent_bits"_a, "mantissa_bits"_a,
           "entries"_a, nb::keep_alive<1, 2>())
      .def("encode", &PredictiveChain::encode<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("encode", &PredictiveChain::encode<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("measure", &PredictiveChain::measure<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("measure", &PredictiveChain::measure<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a)
      .def("decode", &PredictiveChain::decode<std::uint8_t>, "layer"_a, "part"_a, "data"_a, "out"_a)
      .def("decode", &PredictiveChain::decode<std::uint16_t>, "layer"_a, "part"_a, "data"_a, "out"_a);
}

}  // namespace kvzip::predictive
