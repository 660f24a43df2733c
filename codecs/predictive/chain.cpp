#include "predictive/chain.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "predictive/block_parts.hpp"

namespace kvzip::predictive {
namespace {

// How many pairs tell enough of how RoPE turned a part's keys.
constexpr std::size_t kEnoughPairs = 256;

// Before there is memory for so many.
std::size_t tokens_of(std::size_t rows, std::size_t count) {
  if (rows && count > kMostTokens / rows) throw std::invalid_argument("too many tokens in a block");
  return rows * count;
}

}  // namespace

Chain::Chain(const ProfileModel& model, std::size_t rows, std::size_t count, std::uint64_t position,
             NumberFormat format, Span<std::int32_t> entries)
    : model_(model),
      format_(format),
      total_(tokens_of(rows, count)),
      entries_(take(entries, total_, "entries")),
      energy_(total_, kOne),
      entry_(total_),
      at_(total_) {
  if (format.bits() != 8 && format.bits() != 16) throw std::invalid_argument("not 8 or 16 bits");
  for (std::int32_t e : entries_)
    if (e < -1) throw std::invalid_argument("no such token");
  tokens_.rows = rows;
  tokens_.count = count;
  tokens_.position = position;
  tokens_.energy = energy_.data();
  tokens_.entry = entry_.data();
  tokens_.at = at_.data();
}

bool Chain::follows(std::size_t layer, int part, std::size_t heads, std::size_t dim) const {
  if (layer != this->layer() || part != this->part()) return false;
  const Part& p = model_.layer(layer).part[part];
  return heads == p.heads && dim == p.dim;
}

RopeRounding Chain::rounding(const Block<const std::uint16_t>& numbers, Span<float> rotation,
                             bool wide) const {
  check_rotation(rotation);
  const Part& part = model_.layer(layer()).part[this->part()];
  const std::size_t step = std::max<std::size_t>(total_ / kTile, 1),
                    count = std::min<std::size_t>(total_, kTile);
  for (const RopeRounding way : {RopeRounding::each, RopeRounding::once, RopeRounding::wide}) {
    if (is_wide(way) != wide) continue;
    std::size_t telling = 0, turned = 0;
    for (std::size_t i = 0; i < part.turned() / 2 && telling < kEnoughPairs; ++i) {
      // Pairs here and there, of one head and another.
      const std::size_t h = i % part.heads, p = i / part.heads * 7 % part.pairs;
      const std::ptrdiff_t place = std::ptrdiff_t(part.first_of(p)) * numbers.dim_stride,
                           apart = std::ptrdiff_t(part.apart()) * numbers.dim_stride;
      std::uint16_t sample[2][kTile] = {};
      float by[2][kTile] = {};
      for (std::size_t t = 0; t < count; ++t) {
        const std::size_t row = t * step / tokens_.count, column = t * step % tokens_.count;
        const std::uint16_t* const at = numbers.data + std::ptrdiff_t(row) * numbers.row_stride +
                                        std::ptrdiff_t(h) * numbers.head_stride +
                                        std::ptrdiff_t(column) * numbers.token_stride + place;
        const float* const angles = rotation.data + 2 * part.pairs * column + p;
        sample[0][t] = at[0];
        sample[1][t] = at[apart];
        by[0][t] = angles[0];
        by[1][t] = angles[part.pairs];
      }
      const Sampled found = predictive::kernels().sample(sample[0], sample[1], by[0], by[1], count,
                                                         rounds_products(way));
      telling += std::size_t(__builtin_popcountll(found.telling));
      turned += std::size_t(__builtin_popcountll(found.turned));
    }
    // Of numbers that came about in another way about a third at most have such a pair.
    if (telling && turned * 8 >= telling * 7) return part.side_by_side ? side_by_side(way) : way;
  }
  return RopeRounding::none;
}

void Chain::check_rotation(Span<float> rotation) const {
  const std::size_t pairs = model_.layer(layer()).part[part()].pairs;
  if (format_.exponent_bits != 8 || format_.mantissa_bits != 7 || !pairs ||
      rotation.size != 2 * pairs * tokens_.count)
    throw std::invalid_argument("pairs before RoPE, and nothing that says how they are turned");
}
void Chain::set_rotation(Span<float> rotation, RopeRounding rounding) {
  const bool turned = rounding != RopeRounding::none;
  if (turned) check_rotation(rotation);
  if (turned && is_side_by_side(rounding) != model_.layer(layer()).part[part()].side_by_side)
    throw std::invalid_argument("pairs before RoPE that are not the profile's");
  rounding_ = rounding;
  tokens_.rotation = turned ? rotation.data : nullptr;
  tokens_.rounds_products = rounds_products(rounding);
}

template <typename T>
double Chain::measure(const Block<const T>& numbers, std::uint32_t* counts, Span<float> rotation,
                      RopeRounding rounding) {
  set_rotation(rotation, rounding);
  energy_before_ = energy_;
  const Layer& layer = model_.layer(this->layer());
  const Part& p = layer.part[part()];
  const Kernels& kernels = predictive::kernels();
  begin(kernels);
  take_intervals(p.channels());
  double bits;
  if constexpr (sizeof(T) == 1)
    bits = kernels.model8(model_.model(), layer, part(), format_, tokens_, numbers, intervals_,
                          counts);
  else
    bits = kernels.model16(model_.model(), layer, part(), format_, tokens_, numbers, intervals_,
                           counts);
  end(kernels);
  return bits;
}

// Room for a part's intervals, in place of those that were not kept.
void Chain::take_intervals(std::size_t channels) {
  drop_intervals();
  std::size_t all = 0;
  for (std::size_t i = layer(); i < model_.layers(); ++i)
    all += 8 * (total_ * model_.layer(i).width + 2 * kTile);
  room_ = total_ * channels + kTile;
  auto* const start = static_cast<std::uint32_t*>(stack_.push(8 * room_, all));
  intervals_ = {start, start + room_};
}
void Chain::drop_intervals() {
  if (room_) stack_.pop(8 * room_);
  room_ = 0;
}

void Chain::again() {
  if (next_ % 2 == 0) throw std::invalid_argument("keys alone can be measured again");
  --next_;
  energy_ = energy_before_;
  tokens_.energy = energy_.data();
}

void Chain::keep() {
  kept_.push_back(
      {(next_ - 1) / 2, int((next_ - 1) % 2), room_, intervals_, at_, tiles_, rounding_});
  room_ = 0;
}

void Chain::encode(const Room& room) {
  if (kept_.empty()) return;
  const std::size_t lanes = model_.layer(0).lanes;
  std::vector<std::uint64_t> states(total_ * lanes, kLow);
  std::vector<std::uint32_t> words;
  drop_intervals();
  for (std::size_t i = kept_.size(); i-- > 0;) {
    Kept& kept = kept_[i];
    const Layer& layer = model_.layer(kept.layer);
    const Part& part = layer.part[kept.part];
    const StreamTokens streams(kept.tiles, lanes);
    std::vector<std::uint16_t> counts(streams.streams());
    // At most a word for each number, and one that is written before it is known whether it counts.
    words.resize(total_ * part.channels() + 1);
    const std::size_t n = predictive::kernels().encode(
        part, format_, layer.group, lanes, kept.at.data(), kept.tiles.data(), kept.tiles.size(),
        kept.intervals, states.data(), counts.data(), words.data() + words.size());
    const std::vector<std::uint8_t> packed = pack_counts(streams, counts, n, kept.rounding);
    std::vector<std::uint8_t> first;
    if (!i) first = pack_states(states);
    std::uint8_t* out = room(i, packed.size() + first.size() + 4 * n);
    const auto put = [&out](const void* data, std::size_t size) {
      if (size) std::memcpy(out, data, size);
      out += size;
    };
    put(packed.data(), kHeaderBytes);
    put(first.data(), first.size());
    put(packed.data() + kHeaderBytes, packed.size() - kHeaderBytes);
    put(words.data() + words.size() - n, 4 * n);
    stack_.pop(8 * kept.room);
    kept = {};
  }
  kept_.clear();
}

template <typename T>
bool Chain::decode(Span<std::uint8_t> header, Span<std::uint8_t> bytes, const Block<T>& numbers,
                   Span<float> rotation) {
  const Layer& layer = model_.layer(this->layer());
  const std::size_t lanes = layer.lanes;
  if (header.size != kHeaderBytes) return false;
  set_rotation(rotation, RopeRounding(header.data[0] == kUnturned ? header.data[2] : 0));
  // The states that a token range's first coded part begins with.
  if (states_.empty() && !unpack_states(&bytes, total_ * lanes, &states_)) return false;
  const Kernels& kernels = predictive::kernels();
  begin(kernels);
  std::vector<std::uint32_t> counts;
  if (!unpack_counts(StreamTokens(tiles_, lanes), header.data, &bytes, &counts)) return false;
  std::vector<const std::uint8_t*> word(counts.size()), last(counts.size());
  const std::uint8_t* next = bytes.data;
  for (std::size_t s = 0; s < counts.size(); ++s) {
    word[s] = next;
    last[s] = next += 4 * std::size_t(counts[s]);
  }
  const Coded coded{states_.data(), word.data(), last.data()};
  bool good;
  if constexpr (sizeof(T) == 1)
    good = kernels.decode8(model_.model(), layer, part(), format_, tokens_, numbers, coded);
  else good = kernels.decode16(model_.model(), layer, part(), format_, tokens_, numbers, coded);
  end(kernels);
  // A writer's states end where a reader's begin.
  if (next_ == 2 * model_.layers())
    good = good &&
           std::all_of(states_.begin(), states_.end(), [](std::uint64_t x) { return x == kLow; });
  return good;
}

std::size_t Chain::streams() const {
  return tiles_.empty() ? 0 : tiles_.back().stream + tiles_.back().streams();
}

// The input of a tile: a word of 4 bytes for each group of inputs and token.
void Chain::pack(const Tile& tile, const Kernels& kernels, std::uint32_t* to) const {
  for (std::size_t l : model_.inputs(layer())) {
    const std::size_t blocks = model_.layer(l).blocks;
    const std::uint32_t* const from = inputs_.at(l).data();
    const std::uint32_t* rows[kTile];
    for (std::size_t t = 0; t < kTile; ++t)
      rows[t] = from + at_[tile.start + std::min<std::size_t>(t, tile.count - 1)] * blocks;
    kernels.to_columns(rows, blocks, to);
    to += blocks * kTile;
  }
}

// Tokens in tiles of one region.
void Chain::cut(std::size_t start, std::size_t count, std::uint32_t region) {
  for (std::size_t i = 0; i < count; i += kTile) {
    const auto stream = std::uint32_t(streams());
    tiles_.push_back({std::uint32_t(start + i),
                      std::uint32_t(std::min<std::size_t>(kTile, count - i)), region, stream});
  }
}

void Chain::arrange(const Layer& layer, const Kernels& kernels) {
  tiles_.clear();
  std::iota(at_.begin(), at_.end(), 0);
  cut(0, total_, 0);
  if (layer.regions == 1) return;
  std::vector<std::uint8_t> region(total_);
  Aligned<std::uint32_t> packed(layer.inputs / 4 * kTile);
  const Products& products = kernels.products;
  for (const Tile& tile : tiles_) {
    pack(tile, kernels, packed.data());
    std::int32_t best[kTile];
    alignas(64) std::int32_t sums[4][kTile];
    std::uint8_t* const found = region.data() + tile.start;
    for (std::size_t r = 0; r < layer.regions; ++r) {
      if (r % 4 == 0)
        products.of_four(packed.data(), layer.centre + r * layer.inputs, layer.inputs / 4,
                         layer.inputs * 4, products.in_order ? layer.centre_order + r / 4 : nullptr,
                         model_.centre_start(this->layer()) + r, tile.count, sums);
      for (std::size_t t = 0; t < tile.count; ++t) {
        const std::int32_t score = sums[r % 4][t] + layer.centre_bias[r];
        if (r && score <= best[t]) continue;
        best[t] = score;
        found[t] = std::uint8_t(r);
      }
    }
  }
  std::stable_sort(at_.begin(), at_.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return region[a] < region[b]; });
  tiles_.clear();
  for (std::size_t start = 0, end; start < total_; start = end) {
    const std::uint8_t r = region[at_[start]];
    for (end = start; end < total_ && region[at_[end]] == r;) ++end;
    cut(start, end - start, r);
  }
}

// What turns a layer's keys at each position; mostly it is the same in all layers.
void Chain::take_turns(const Part& keys) {
  std::vector<std::uint64_t> steps(keys.step, keys.step + keys.pairs);
  if (steps == steps_) return;
  const std::int16_t* const sine = model_.model().sine;
  turns_.resize(3 * keys.pairs * tokens_.count);
  std::int16_t* to = turns_.data();
  for (std::size_t column = 0; column < tokens_.count; ++column, to += 3 * keys.pairs)
    for (std::size_t i = 0; i < keys.pairs; ++i) {
      const std::uint64_t phase = steps[i] * (tokens_.position + column);
      const auto turn = std::size_t((phase + (std::uint64_t(1) << 51)) >> 52) & 4095;
      to[i] = sine[turn];
      to[keys.pairs + i] = sine[(turn + 1024) & 4095];
      to[2 * keys.pairs + i] = std::int16_t(turn / (4096 / kAngles));
    }
  steps_ = std::move(steps);
}

void Chain::begin(const Kernels& kernels) {
  const Layer& layer = model_.layer(this->layer());
  if (kernels.products.in_order) model_.put_in_order(this->layer());
  if (part() == 1) return;
  arrange(layer, kernels);
  const std::size_t size = layer.inputs / 4 * kTile, own = layer.blocks * kTile;
  // A unit reads whole steps; what is beyond the inputs it multiplies with 0.
  const std::size_t beyond = kernels.products.unit ? (kUnitGroups - 1) * kTile : 0;
  packed_.resize(tiles_.size() * size + beyond);
  for (std::size_t i = 0; i < tiles_.size(); ++i)
    pack(tiles_[i], kernels, packed_.data() + i * size);
  residual_.assign(tiles_.size() * own + beyond, 0x80808080u);
  output_.assign(tiles_.size() * own, 0x80808080u);
  take_turns(layer.part[0]);
  tokens_.turns = turns_.data();
  turn_.resize(3 * layer.part[0].pairs * kTile);
  own_turn_.resize(2 * layer.part[0].pairs * kTile);
  const auto known = std::int64_t(model_.known(this->layer()));
  for (std::size_t t = 0; t < total_; ++t) entry_[t] = entries_[t] < known ? entries_[t] : -1;
  tokens_.tiles = tiles_.size();
  tokens_.tile = tiles_.data();
  tokens_.input = packed_.data();
  tokens_.residual = residual_.data();
  tokens_.output = output_.data();
  numbers_.resize(std::max(layer.part[0].channels(), layer.part[1].channels()) * kTile);
  tokens_.turn = turn_.data();
  tokens_.own_turn = own_turn_.data();
  tokens_.numbers = numbers_.data();
  tokens_.products = kernels.products;
  if (kernels.products.unit) take_unit(layer);
}

// Room for what a matrix unit takes and gives, of either part.
void Chain::take_unit(const Layer& layer) {
  std::size_t rows = 0;
  for (const Part& part : layer.part) rows = std::max(rows, unit_rows(part.blocks()));
  const std::size_t step = rows * kUnitGroups * 4;
  unit_weight_.resize(unit_steps(layer.inputs / 4) * step);
  unit_within_.resize(unit_steps(layer.blocks) * step);
  unit_sums_.resize(kUnitTiles * rows * kTile);
  tokens_.unit_weight = unit_weight_.data();
  tokens_.unit_within = unit_within_.data();
  tokens_.unit_sums = reinterpret_cast<std::int32_t (*)[kTile]>(unit_sums_.data());
}

void Chain::end(const Kernels& kernels) {
  const std::size_t i = layer();
  if (next_++ % 2 == 0) return;
  if (model_.last_use(i) > i) {
    const std::size_t blocks = model_.layer(i).blocks;
    Aligned<std::uint32_t>& rows = inputs_[i];
    rows.resize(total_ * blocks);
    for (std::size_t n = 0; n < tiles_.size(); ++n) {
      std::uint32_t* row[kTile];
      for (std::size_t t = 0; t < tiles_[n].count; ++t)
        row[t] = rows.data() + at_[tiles_[n].start + t] * blocks;
      kernels.to_rows(output_.data() + n * blocks * kTile, blocks, tiles_[n].count, row);
    }
  }
  for (auto it = inputs_.begin(); it != inputs_.end();)
    it = model_.last_use(it->first) <= i ? inputs_.erase(it) : std::next(it);
}

#define KVZIP_INSTANTIATE(T)                                                         \
  template double Chain::measure(const Block<const T>&, std::uint32_t*, Span<float>, \
                                 RopeRounding);                                      \
  template bool Chain::decode(Span<std::uint8_t>, Span<std::uint8_t>, const Block<T>&, Span<float>);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::predictive
