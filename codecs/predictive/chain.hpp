// A model made of a profile's arrays, and the state of a token range whose layers are coded one
// after the other. Sizes are checked and memory allocated here; Python is not known.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {

template <typename T>
struct Span {
  const T* data = nullptr;
  std::size_t size = 0;
};

// One layer of a profile; spec.md has the shapes. `weight`, `within`, `bias`, the scales of these,
// `centre` and the tables are looked at where they lie, so they must outlive the model.
struct LayerArrays {
  std::vector<std::size_t> inputs;
  std::size_t k_heads, k_dim, v_heads, v_dim, regions;
  std::size_t group, lanes;
  Span<std::int32_t> order;
  Span<std::uint64_t> step;
  Span<std::int8_t> unit;
  Span<std::int32_t> mean, input_scale, bias;
  Span<std::int8_t> weight;
  Span<std::int32_t> weight_scale;
  Span<std::int8_t> within;
  Span<std::int32_t> within_scale;
  Span<std::uint8_t> density;
  Span<std::int32_t> inverse, pair_inverse, pair_slope;
  Span<std::int8_t> centre;
  Span<std::int32_t> centre_bias;
  Span<std::int16_t> table16;
  Span<std::int8_t> table8;
  bool has_table;
};

// Throws std::invalid_argument when arrays do not fit each other.
class ProfileModel {
 public:
  ProfileModel(Span<std::uint32_t> densities, Span<std::int16_t> sine);
  ProfileModel(const ProfileModel&) = delete;
  ~ProfileModel();

  void add_layer(const LayerArrays& arrays);

  const Layer& layer(std::size_t i) const;
  const std::vector<std::size_t>& inputs(std::size_t i) const;
  const std::int32_t* centre_start(std::size_t i) const;
  std::size_t known(std::size_t i) const;     // rows of the layer's token table
  std::size_t last_use(std::size_t i) const;  // the last layer that looks at layer i
  std::size_t classes(std::size_t i) const;
  std::size_t layers() const { return layers_.size(); }
  // To be called before kernels that want an order look at a layer.
  void put_in_order(std::size_t i) const;
  Model model() const;

 private:
  struct Data;
  struct Tables;
  std::size_t shapes_ = 0;
  std::unique_ptr<Tables> tables_;
  std::vector<std::int16_t> sine_;
  std::vector<std::unique_ptr<Data>> layers_;
};

// Codes the parts of a token range in their order: keys, values, then the next layer. States of
// rANS go through all parts that are coded, so a writer models every part before it has the bytes
// of any.
class Chain {
 public:
  // `entries`: [rows*count] place of each token in the model's token ids, or -1.
  Chain(const ProfileModel& model, std::size_t rows, std::size_t count, std::uint64_t position,
        Form form, Span<std::int32_t> entries);
  Chain(const Chain&) = delete;

  // Whether this part comes next, and has this shape.
  bool follows(std::size_t layer, int part, std::size_t heads, std::size_t dim) const;
  std::size_t rows() const { return tokens_.rows; }
  std::size_t count() const { return tokens_.count; }
  Form form() const { return form_; }

  // Models the next part's numbers; their intervals stay until the next call. `counts` as in
  // kernels.hpp.
  template <typename T>
  Intervals measure(const Block<const T>& numbers, std::uint32_t* counts);
  // The part that was measured last is one that will be coded.
  void keep();
  // Bytes of each part that was kept, in their order. None can be kept any more.
  std::vector<std::vector<std::uint8_t>> encode();
  // The next part's numbers; false when the bytes do not fit.
  template <typename T>
  bool decode(Span<std::uint8_t> bytes, const Block<T>& numbers);

 private:
  // What the coder needs of a part that was kept.
  struct Kept {
    std::size_t layer;
    int part;
    std::vector<std::uint32_t> intervals, at;
    std::vector<Tile> tiles;
  };

  std::size_t layer() const { return next_ / 2; }
  int part() const { return int(next_ % 2); }
  std::size_t streams() const;
  bool take_states(Span<std::uint8_t>* bytes, std::size_t lanes);
  void begin(const Kernels& kernels);
  void end();
  void cut(std::size_t start, std::size_t count, std::uint32_t region);
  void arrange(const Layer& layer, const Kernels& kernels);
  void pack(const Tile& tile, std::uint32_t* to) const;

  const ProfileModel& model_;
  Form form_;
  std::size_t total_, next_ = 0;
  Tokens tokens_{};
  std::vector<std::int32_t> entries_, energy_, entry_;
  std::vector<std::uint32_t> at_, packed_, residual_, output_, intervals_;
  std::vector<std::int16_t> turn_;
  std::vector<Tile> tiles_;
  std::map<std::size_t, std::vector<std::uint32_t>>
      inputs_;                         // [tokens][blocks] of layers still needed
  std::vector<std::uint64_t> states_;  // [tokens][lanes], of a reader
  std::vector<Kept> kept_;
};

// Bits that no table for each channel's signs and exponents can go below, mantissas as they are:
// what `channel` takes at least for these numbers, [rows][heads][tokens][dim].
template <typename T>
double bits_by_channel(const Block<const T>& numbers, std::size_t rows, std::size_t heads,
                       std::size_t tokens, std::size_t dim, Form form);

}  // namespace kvzip::predictive
