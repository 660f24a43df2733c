// The state of a token range whose layers are coded one after the other. Sizes are checked and
// memory is allocated here; Python is not known.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "native/rope_rounding.hpp"
#include "predictive/kernels.hpp"
#include "predictive/memory.hpp"
#include "predictive/profile_model.hpp"

namespace kvzip::predictive {

// Codes the parts of a token range in their order: keys, values, then the next layer. States of
// rANS go through all parts that are coded, so a writer models every part before it has the bytes
// of any.
class Chain {
 public:
  // `entries`: [rows*count] place of each token in the model's token ids, or -1.
  Chain(const ProfileModel& model, std::size_t rows, std::size_t count, std::uint64_t position,
        NumberFormat format, Span<std::int32_t> entries);
  Chain(const Chain&) = delete;

  // Whether this part comes next, and has this shape.
  bool follows(std::size_t layer, int part, std::size_t heads, std::size_t dim) const;
  std::size_t rows() const { return tokens_.rows; }
  std::size_t count() const { return tokens_.count; }
  NumberFormat format() const { return format_; }

  // How RoPE rounded when it turned the next part's keys by these cosines and sines (kernels.hpp),
  // as a sample of them says; `none` if it did not.
  // `wide`: whether cosines and sines are of more bits than bf16 has.
  RopeRounding rounding(const Block<const std::uint16_t>& numbers, Span<float> rotation,
                        bool wide) const;
  // Models the next part's numbers, and tells the bits of a code by their intervals, which stay
  // until the next call. `counts` as in kernels.hpp. `rounding`: unless it is none, pairs may be
  // coded as they were before `rotation`.
  template <typename T>
  double measure(const Block<const T>& numbers, std::uint32_t* counts, Span<float> rotation,
                 RopeRounding rounding);
  // The keys that were measured last come next once more.
  void again();
  // The part that was measured last is one that will be coded.
  void keep();
  std::size_t kept() const { return kept_.size(); }
  // Memory for the bytes of a part, by its number among those that were kept.
  using Room = std::function<std::uint8_t*(std::size_t part, std::size_t size)>;
  // The bytes of each part that was kept, the last one's first. None can be kept any more.
  void encode(const Room& room);
  // The next part's numbers, from a block's header and what follows what is stored as it is; false
  // when the bytes do not fit. `rotation`: for blocks that need it, or empty.
  template <typename T>
  bool decode(Span<std::uint8_t> header, Span<std::uint8_t> bytes, const Block<T>& numbers,
              Span<float> rotation);

 private:
  // What the coder needs of a part that was kept.
  struct Kept {
    std::size_t layer;
    int part;
    std::size_t room;
    Intervals intervals;
    std::vector<std::uint32_t> at;
    std::vector<Tile> tiles;
    RopeRounding rounding;
  };

  std::size_t layer() const { return next_ / 2; }
  int part() const { return int(next_ % 2); }
  std::size_t streams() const;
  void take_intervals(std::size_t channels);
  void drop_intervals();
  void begin(const Kernels& kernels);
  void take_turns(const Part& keys);
  void take_unit(const Layer& layer);
  void check_rotation(Span<float> rotation) const;
  void set_rotation(Span<float> rotation, RopeRounding rounding);
  void end(const Kernels& kernels);
  void cut(std::size_t start, std::size_t count, std::uint32_t region);
  void arrange(const Layer& layer, const Kernels& kernels);
  void pack(const Tile& tile, const Kernels& kernels, std::uint32_t* to) const;

  const ProfileModel& model_;
  NumberFormat format_;
  std::size_t total_, next_ = 0;
  Tokens tokens_{};
  std::vector<std::int32_t> entries_, energy_, entry_;
  std::vector<std::int32_t> energy_before_;  // the part that was measured last
  RopeRounding rounding_ = RopeRounding::none;
  std::vector<std::uint32_t> at_;
  Aligned<std::uint32_t> packed_, residual_, output_;
  std::vector<std::uint64_t> steps_;  // of which `turns_` are
  std::vector<std::int16_t> turns_;
  Aligned<std::int16_t> turn_;
  Aligned<float> own_turn_;
  Aligned<std::uint16_t> numbers_;
  Aligned<std::int8_t> unit_weight_, unit_within_;
  Aligned<std::int32_t> unit_sums_;
  std::vector<Tile> tiles_;
  std::map<std::size_t, Aligned<std::uint32_t>> inputs_;  // [tokens][blocks] of layers still needed
  std::vector<std::uint64_t> states_;                     // [tokens][lanes], of a reader
  Stack stack_;                                           // of intervals
  Intervals intervals_{};                                 // of the part that was measured last
  std::size_t room_ = 0;  // for how many there is room; 0 when they are kept
  std::vector<Kept> kept_;
};

}  // namespace kvzip::predictive
