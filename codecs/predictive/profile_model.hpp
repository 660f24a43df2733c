// A model made of a profile's arrays, whose sizes and bounds are checked here. Python is not known.
#pragma once

#include <memory>
#include <vector>

#include "predictive/kernels.hpp"
#include "predictive/span.hpp"

namespace kvzip::predictive {

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

}  // namespace kvzip::predictive
