// What Python sees of the predictive codec: a model made from a profile's arrays, and the state of
// a token range. Shapes are checked here and in chain.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "native/bindings.hpp"
#include "predictive/block_parts.hpp"
#include "predictive/chain.hpp"
#include "predictive/least_bits.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvzip::predictive {
namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Optional = std::optional<Array<T>>;
template <typename T>
using Numbers = nb::ndarray<T, nb::ndim<4>, nb::device::cpu>;

template <typename T>
Span<T> span(const Array<T>& a) {
  return {a.data(), a.size()};
}
template <typename T>
Span<T> span(const Optional<T>& a) {
  return a ? span(*a) : Span<T>{};
}

// A model and the arrays that it looks at.
class PredictiveModel {
 public:
  PredictiveModel(const Array<std::uint32_t>& densities, const Array<std::int16_t>& sine)
      : model(span(densities), span(sine)) {}

  void add_layer(const std::vector<std::size_t>& inputs, const std::vector<std::size_t>& k_shape,
                 const std::vector<std::size_t>& v_shape, std::size_t group, std::size_t lanes,
                 const Array<std::int32_t>& order, const Array<std::uint64_t>& step,
                 const Array<std::int8_t>& unit, const Array<std::int32_t>& mean,
                 const Array<std::int32_t>& input_scale, const Array<std::int32_t>& bias,
                 const Array<std::int8_t>& weight, const Array<std::int32_t>& weight_scale,
                 const Array<std::int8_t>& within, const Array<std::int32_t>& within_scale,
                 const Array<std::uint8_t>& density, const Array<std::int32_t>& inverse,
                 const Array<std::int32_t>& pair_inverse, const Array<std::int32_t>& pair_slope,
                 const Optional<std::int8_t>& centre, const Optional<std::int32_t>& centre_bias,
                 const Optional<std::int16_t>& table16, const Optional<std::int8_t>& table8) {
    if (k_shape.size() != 2 || v_shape.size() != 2 || bias.ndim() != 2)
      throw std::invalid_argument("shapes");
    for (const Array<std::int32_t>& a : {bias, weight_scale, within_scale}) kept32_.push_back(a);
    for (const Array<std::int8_t>& a : {weight, within}) kept8_.push_back(a);
    for (const Optional<std::int8_t>& a : {centre, table8})
      if (a) kept8_.push_back(*a);
    if (table16) kept16_.push_back(*table16);
    model.add_layer({inputs,
                     k_shape[0],
                     k_shape[1],
                     v_shape[0],
                     v_shape[1],
                     bias.shape(0),
                     group,
                     lanes,
                     span(order),
                     span(step),
                     span(unit),
                     span(mean),
                     span(input_scale),
                     span(bias),
                     span(weight),
                     span(weight_scale),
                     span(within),
                     span(within_scale),
                     span(density),
                     span(inverse),
                     span(pair_inverse),
                     span(pair_slope),
                     span(centre),
                     span(centre_bias),
                     span(table16),
                     span(table8),
                     table16 || table8});
  }

  // Whether RoPE turns numbers 2 i and 2 i + 1 of a layer's keys together.
  bool side_by_side(std::size_t i) const {
    if (i >= model.layers()) throw std::invalid_argument("no such layer");
    return model.layer(i).part[0].side_by_side;
  }

  ProfileModel model;

 private:
  std::vector<Array<std::int8_t>> kept8_;
  std::vector<Array<std::int16_t>> kept16_;
  std::vector<Array<std::int32_t>> kept32_;
};

class PredictiveChain {
 public:
  PredictiveChain(const PredictiveModel& model, std::size_t rows, std::size_t count,
                  std::uint64_t position, int exponent_bits, int mantissa_bits,
                  const Array<std::int32_t>& entries)
      : model_(model.model),
        chain_(model.model, rows, count, position, {exponent_bits, mantissa_bits}, span(entries)) {}

  // The ideal code length of the next part in bits; what follows is to be predicted from its
  // numbers.
  template <typename T>
  double model(std::size_t i, int part, const Numbers<const T>& array,
               const Optional<float>& rotation, int rounding) {
    const Block<const T> in = block(i, part, array);
    const RopeRounding way = checked(rounding);
    const Computing computing;
    return chain_.measure(in, nullptr, span(rotation), way);
  }

  // How RoPE rounded when it turned these keys, 1 to 6 (RopeRounding); 0, it did not.
  int rounding(std::size_t i, int part, const Numbers<const std::uint16_t>& array,
               const Array<float>& rotation, bool wide) {
    const Block<const std::uint16_t> in = block(i, part, array);
    const Computing computing;
    return int(chain_.rounding(in, span(rotation), wide));
  }

  void again() { chain_.again(); }
  void keep() { chain_.keep(); }

  // The bytes of each part that was kept.
  std::vector<nb::bytes> encode() {
    std::vector<nb::bytes> found(chain_.kept());
    const auto room = [&found](std::size_t part, std::size_t size) {
      const Locked locked;
      found[part] = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(size)));
      if (!found[part].is_valid()) throw nb::python_error();
      return reinterpret_cast<std::uint8_t*>(PyBytes_AsString(found[part].ptr()));
    };
    {
      const Computing computing;
      chain_.encode(room);
    }
    return found;
  }

  // How often each cell of |z| occurs, [classes][channels][kCells] in coding order, and the ideal
  // code length in bits.
  template <typename T>
  nb::tuple measure(std::size_t i, int part, const Numbers<const T>& array,
                    const Optional<float>& rotation, int rounding) {
    const RopeRounding way = checked(rounding);
    const Block<const T> in = block(i, part, array);
    const std::size_t classes = model_.classes(i), channels = array.shape(1) * array.shape(3);
    auto* counts = new std::uint32_t[classes * channels * kCells]();
    nb::capsule owner(counts, [](void* p) noexcept { delete[] static_cast<std::uint32_t*>(p); });
    double spent = 0;
    {
      const Computing computing;
      spent = chain_.measure(in, counts, span(rotation), way);
    }
    return nb::make_tuple(nb::ndarray<nb::numpy, std::uint32_t>(
                              counts, {classes, channels, std::size_t(kCells)}, owner),
                          spent);
  }

  template <typename T>
  void decode(std::size_t i, int part, const Array<std::uint8_t>& header,
              const Array<std::uint8_t>& bytes, const Numbers<T>& array,
              const Optional<float>& rotation) {
    const Block<T> out = block(i, part, array);
    bool good;
    {
      const Computing computing;
      good = chain_.decode(span(header), span(bytes), out, span(rotation));
    }
    if (!good) throw std::invalid_argument("its words do not fit");
  }

 private:
  static RopeRounding checked(int rounding) {
    if (rounding && !is_rope_rounding(rounding)) throw std::invalid_argument("rounding is 0 to 6");
    return RopeRounding(rounding);
  }

  template <typename T>
  Block<T> block(std::size_t i, int part, const Numbers<T>& array) const {
    if (array.shape(0) != chain_.rows() || array.shape(2) != chain_.count() ||
        8 * int(sizeof(T)) != chain_.format().bits() ||
        !chain_.follows(i, part, array.shape(1), array.shape(3)))
      throw std::invalid_argument("a block of another shape or dtype, or out of turn");
    return {array.data(), array.stride(0), array.stride(1), array.stride(2), array.stride(3)};
  }

  const ProfileModel& model_;
  Chain chain_;
};

template <typename T>
double least_bits(const Numbers<const T>& a, int exponent_bits, int mantissa_bits, double enough) {
  if (1 + exponent_bits + mantissa_bits != 8 * int(sizeof(T)) || exponent_bits < 1 ||
      exponent_bits > 8)
    throw std::invalid_argument("not a format of these numbers");
  const Computing computing;
  return bits_by_channel(
      Block<const T>{a.data(), a.stride(0), a.stride(1), a.stride(2), a.stride(3)}, a.shape(0),
      a.shape(1), a.shape(2), a.shape(3), {exponent_bits, mantissa_bits}, enough);
}

}  // namespace

void bind(nb::module_& m) {
  m.def("bits_by_channel", &least_bits<std::uint8_t>, "numbers"_a.noconvert(), "exponent_bits"_a,
        "mantissa_bits"_a, "enough"_a);
  m.def("bits_by_channel", &least_bits<std::uint16_t>, "numbers"_a.noconvert(), "exponent_bits"_a,
        "mantissa_bits"_a, "enough"_a);
  m.def("bits_by_channel", &least_bits<std::uint32_t>, "numbers"_a.noconvert(), "exponent_bits"_a,
        "mantissa_bits"_a, "enough"_a);
  nb::class_<PredictiveModel>(m, "PredictiveModel")
      .def(nb::init<const Array<std::uint32_t>&, const Array<std::int16_t>&>(), "densities"_a,
           "sine"_a)
      .def("add_layer", &PredictiveModel::add_layer, "inputs"_a, "k_shape"_a, "v_shape"_a,
           "group"_a, "lanes"_a, "order"_a, "step"_a, "unit"_a, "mean"_a, "input_scale"_a, "bias"_a,
           "weight"_a, "weight_scale"_a, "within"_a, "within_scale"_a, "density"_a, "inverse"_a,
           "pair_inverse"_a, "pair_slope"_a, "centre"_a.none(), "centre_bias"_a.none(),
           "table16"_a.none(), "table8"_a.none())
      .def("side_by_side", &PredictiveModel::side_by_side, "layer"_a,
           "Whether RoPE turns numbers 2 i and 2 i + 1 of its keys together.");
  nb::class_<PredictiveChain>(m, "PredictiveChain")
      .def(nb::init<const PredictiveModel&, std::size_t, std::size_t, std::uint64_t, int, int,
                    const Array<std::int32_t>&>(),
           "model"_a, "rows"_a, "count"_a, "position"_a, "exponent_bits"_a, "mantissa_bits"_a,
           "entries"_a, nb::keep_alive<1, 2>())
      .def("model", &PredictiveChain::model<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a,
           "rotation"_a = nb::none(), "rounding"_a = 0)
      .def("model", &PredictiveChain::model<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a,
           "rotation"_a = nb::none(), "rounding"_a = 0)
      .def("rounding", &PredictiveChain::rounding, "layer"_a, "part"_a, "numbers"_a, "rotation"_a,
           "wide"_a)
      .def("again", &PredictiveChain::again)
      .def("keep", &PredictiveChain::keep)
      .def("encode", &PredictiveChain::encode)
      .def("measure", &PredictiveChain::measure<std::uint8_t>, "layer"_a, "part"_a, "numbers"_a,
           "rotation"_a = nb::none(), "rounding"_a = 0)
      .def("measure", &PredictiveChain::measure<std::uint16_t>, "layer"_a, "part"_a, "numbers"_a,
           "rotation"_a = nb::none(), "rounding"_a = 0)
      .def("decode", &PredictiveChain::decode<std::uint8_t>, "layer"_a, "part"_a, "header"_a,
           "data"_a, "out"_a, "rotation"_a = nb::none())
      .def("decode", &PredictiveChain::decode<std::uint16_t>, "layer"_a, "part"_a, "header"_a,
           "data"_a, "out"_a, "rotation"_a = nb::none());
}

}  // namespace kvzip::predictive
