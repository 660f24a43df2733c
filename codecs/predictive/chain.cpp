#include "predictive/chain.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

namespace kvzip::predictive {
namespace {

std::size_t round16(std::size_t n) { return (n + 15) / 16 * 16; }

template <typename T>
const T* look(Span<T> array, std::size_t size, const char* what) {
  if (array.size != size) throw std::invalid_argument(std::string(what) + " has another size");
  return array.data;
}

template <typename T>
std::vector<T> take(Span<T> array, std::size_t size, const char* what) {
  const T* from = look(array, size, what);
  return std::vector<T>(from, from + size);
}

void check_bounds(const std::vector<std::int32_t>& v, std::int32_t low, std::int32_t high,
                  const char* what) {
  for (std::int32_t x : v)
    if (x < low || x > high) throw std::invalid_argument(std::string(what) + " is out of bounds");
}

// -128 times the sum of what each output of a blocked matrix [blocks][groups][4][4] reads: all
// groups, or in each block the first `reads` of them.
std::vector<std::int32_t> starts(const std::int8_t* matrix, std::size_t blocks, std::size_t groups,
                                 const std::uint16_t* reads = nullptr) {
  std::vector<std::int32_t> sums(4 * blocks);
  for (std::size_t b = 0; b < blocks; ++b)
    for (std::size_t g = 0; g < (reads ? reads[b] : groups); ++g)
      for (std::size_t i = 0; i < 16; ++i) {
        const std::int8_t w = matrix[(b * groups + g) * 16 + i];
        if (w == -128) throw std::invalid_argument("a weight is out of bounds");
        sums[4 * b + i / 4] -= 128 * w;
      }
  return sums;
}

// In which order kernels take the groups of a blocked matrix (`Order`), block by block: of all, or
// in each block of the first `reads`.
class Orders {
 public:
  Orders(const std::int8_t* matrix, std::size_t blocks, std::size_t groups,
         const std::uint16_t* reads = nullptr)
      : group_(reads ? std::accumulate(reads, reads + blocks, std::size_t(0)) : blocks * groups),
        of_(blocks) {
    std::uint16_t* to = group_.data();
    std::vector<std::uint8_t> reach(groups);
    std::vector<std::uint16_t> by_reach(groups);
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::size_t n = reads ? reads[b] : groups;
      of_[b] = {to, arrange(matrix + b * groups * 16, n, reach.data(), by_reach.data(), to)};
      to += n;
    }
  }
  const Order* of() const { return of_.data(); }

 private:
  // 255 times that fits 16 bits.
  static constexpr int kMost = 128;

  // The largest sum of weights of one sign that a group adds to one of 16 bits.
  static std::uint8_t reach_of(const std::int8_t* w) {
    int most = 0;
    for (int i = 0; i < 16; i += 2) {
      const int a = w[i], b = w[i + 1], up = std::max(a, 0) + std::max(b, 0);
      most = std::max({most, up, up - a - b});
    }
    return std::uint8_t(most);
  }

  // Those that reach furthest go with those that reach least. Returns how many pairs there are.
  static std::uint32_t arrange(const std::int8_t* w, std::size_t n, std::uint8_t* reach,
                               std::uint16_t* by_reach, std::uint16_t* to) {
    std::size_t count[257] = {};
    for (std::size_t g = 0; g < n; ++g) ++count[1 + (reach[g] = reach_of(w + g * 16))];
    for (int r = 0; r < 256; ++r) count[r + 1] += count[r];
    for (std::size_t g = 0; g < n; ++g) by_reach[count[reach[g]]++] = std::uint16_t(g);
    std::uint16_t* const begin = to;
    std::uint16_t* alone = to + n;
    for (std::size_t low = 0, high = n; low < high;) {
      const std::uint16_t most = by_reach[--high];
      if (low < high && reach[by_reach[low]] + reach[most] <= kMost) {
        *to++ = by_reach[low++];
        *to++ = most;
      } else {
        *--alone = most;
      }
    }
    return std::uint32_t(to - begin) / 2;
  }

  std::vector<std::uint16_t> group_;
  std::vector<Order> of_;
};

// The first channel of a channel's group, in a layer with so many channels of keys.
std::size_t group_start(const Layer& layer, std::size_t keys, std::size_t channel) {
  const std::size_t first = channel < keys ? 0 : keys;
  return first + (channel - first) / layer.group * layer.group;
}

// How many blocks of four channels each block of `within` reads.
std::vector<std::uint16_t> reads_of(const Layer& layer, std::size_t keys) {
  std::vector<std::uint16_t> reads(layer.blocks);
  for (std::size_t b = 0; b < layer.blocks; ++b)
    reads[b] =
        std::uint16_t(up4(group_start(layer, keys, std::min(4 * b + 3, layer.width - 1))) / 4);
  return reads;
}

// What is read of `within` is zero where a channel would look at one of its own group or after it.
void check_groups(const std::int8_t* within, const Layer& layer, std::size_t keys) {
  for (std::size_t c = 0; c < layer.width; ++c)
    for (std::size_t i = group_start(layer, keys, c); i < 4u * layer.reads[c / 4]; ++i)
      if (within[(c / 4 * layer.blocks + i / 4) * 16 + c % 4 * 4 + i % 4])
        throw std::invalid_argument("a channel is predicted from its own group");
}

}  // namespace

// Densities, see kernels.hpp.
struct ProfileModel::Tables {
  Densities of{};
  std::vector<std::int32_t> from, rise, from_rise;
  std::vector<float> cell, slope, cell_slope;

  Tables(const std::uint32_t* shares, std::size_t shapes) {
    for (std::size_t s = 0; s < shapes; ++s, shares += kCells + 1) {
      std::int32_t edge[kCells + 1];
      for (int i = 0; i <= kCells; ++i)
        edge[i] = std::int32_t(std::uint64_t(shares[i]) * std::uint64_t(kHalf) >> 23);
      for (int i = 0; i < kCells; ++i) {
        from.push_back(edge[i]);
        rise.push_back(edge[i + 1] - edge[i]);
      }
      double at[65];
      for (int i = 0; i <= 64; ++i) {
        const double tail = std::ldexp(1 + (i & 3) / 4.0, 7 + i / 4), share = kHalf - tail;
        const int c = int(std::upper_bound(edge, edge + kCells, share) - edge) - 1;
        at[i] =
            c < 0 ? 0 : c + std::min(1.0, (share - edge[c]) / std::max(1, edge[c + 1] - edge[c]));
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
    of.from_rise = beside(from, rise, &from_rise);
    of.cell_slope = beside(cell, slope, &cell_slope);
  }

 private:
  template <typename T>
  static const T* beside(const std::vector<T>& a, const std::vector<T>& b, std::vector<T>* both) {
    for (std::size_t i = 0; i < a.size(); ++i) both->insert(both->end(), {a[i], b[i]});
    return both->data();
  }
};

struct ProfileModel::Data {
  Layer layer{};
  std::vector<std::size_t> inputs;
  std::vector<Region> regions;
  std::vector<std::int32_t> order[2], inverse, pair_inverse, pair_slope, mean, input_scale,
      centre_bias, centre_start;
  std::vector<std::vector<std::int32_t>> start;
  std::vector<std::uint16_t> reads;
  std::once_flag ordering;
  std::vector<Orders> orders;
  std::vector<std::uint64_t> step;
  std::vector<std::int8_t> unit;
  std::vector<std::uint8_t> density;
  std::size_t known = 0, last_use = 0;
};

ProfileModel::~ProfileModel() = default;

ProfileModel::ProfileModel(Span<std::uint32_t> densities, Span<std::int16_t> sine) {
  shapes_ = densities.size / (kCells + 1);
  if (shapes_ == 0 || shapes_ > 256 || densities.size != shapes_ * (kCells + 1))
    throw std::invalid_argument("densities have another shape");
  const std::uint32_t* d = densities.data;
  for (std::size_t s = 0; s < shapes_; ++s, d += kCells + 1) {
    bool good = d[0] == 0 && d[kCells] == kCdf / 2;
    for (int i = 0; i < kCells; ++i) good = good && d[i] <= d[i + 1] && d[i + 1] - d[i] < 1u << 20;
    if (!good) throw std::invalid_argument("a density does not rise evenly from 0 to a half");
  }
  tables_ = std::make_unique<Tables>(densities.data, shapes_);
  sine_ = take(sine, 4096, "sine");
  for (std::int16_t s : sine_)
    if (s < -(1 << 14) || s > 1 << 14) throw std::invalid_argument("a sine is out of bounds");
}

void ProfileModel::add_layer(const LayerArrays& a) {
  auto data = std::make_unique<Data>();
  Layer& layer = data->layer;
  if (std::max({a.k_heads, a.k_dim, a.v_heads, a.v_dim}) > 1u << 16)
    throw std::invalid_argument("more than 65,536 channels in a layer");
  const std::size_t n[2] = {a.k_heads * a.k_dim, a.v_heads * a.v_dim};
  layer.width = n[0] + n[1];
  if (layer.width > 1u << 16) throw std::invalid_argument("more than 65,536 channels in a layer");
  layer.blocks = up4(layer.width) / 4;
  layer.group = a.group;
  layer.lanes = a.lanes;
  if (a.group < 2 || a.group > kMostGroup || a.group % 2)
    throw std::invalid_argument("a group is of 2, 4 ... 64 channels");
  if (a.lanes < 1 || a.lanes > a.group / 2)
    throw std::invalid_argument("1 lane, or at most as many as a group has pairs");
  if (!layers_.empty() &&
      (a.group != layers_[0]->layer.group || a.lanes != layers_[0]->layer.lanes))
    throw std::invalid_argument("groups and lanes are those of all layers");
  // The words of a stream are counted in 16 bits; a number takes one at most.
  const std::size_t a_lane = 2 * ((a.group / 2 + a.lanes - 1) / a.lanes);
  for (std::size_t channels : n)
    if (kStream * a_lane * ((channels + a.group - 1) / a.group) > 65535)
      throw std::invalid_argument("too few lanes for so many channels");
  const std::size_t pairs = a.step.size;
  if (2 * pairs > a.k_dim) throw std::invalid_argument("more pairs than dimensions");
  data->inputs = a.inputs;
  for (std::size_t l : a.inputs) {
    if (l >= layers_.size()) throw std::invalid_argument("an input is no earlier layer");
    layer.inputs += up4(layers_[l]->layer.width);
    // Sums of products of a byte and a weight must fit 32 bits.
    if (layer.inputs > 1u << 16) throw std::invalid_argument("more than 65,536 inputs");
  }
  layer.regions = a.regions;
  if (layer.regions < 1 || layer.regions > 256) throw std::invalid_argument("1 to 256 regions");
  const std::size_t all = layer.regions * layer.width;
  const std::int32_t *bias = look(a.bias, all, "bias"),
                     *scale = look(a.weight_scale, all, "weight_scale"),
                     *within_scale = look(a.within_scale, all, "within_scale");
  const std::size_t size = layer.blocks * layer.inputs * 4,
                    triangle = layer.blocks * layer.blocks * 16;
  const std::int8_t *weight = look(a.weight, layer.regions * size, "weight"),
                    *within = look(a.within, layer.regions * triangle, "within");
  data->reads = reads_of(layer, n[0]);
  layer.reads = data->reads.data();
  for (std::size_t r = 0; r < layer.regions; ++r) {
    check_groups(within + r * triangle, layer, n[0]);
    data->start.push_back(starts(weight + r * size, layer.blocks, layer.inputs / 4));
    data->start.push_back(starts(within + r * triangle, layer.blocks, layer.blocks, layer.reads));
    data->regions.push_back({bias + r * layer.width, weight + r * size, scale + r * layer.width,
                             within + r * triangle, within_scale + r * layer.width,
                             data->start[2 * r].data(), data->start[2 * r + 1].data()});
  }
  layer.region = data->regions.data();
  if (layer.regions > 1) {
    const std::size_t blocks = up4(layer.regions) / 4;
    layer.centre = look(a.centre, blocks * layer.inputs * 4, "centre");
    data->centre_bias = take(a.centre_bias, layer.regions, "centre_bias");
    check_bounds(data->centre_bias, -(1 << 30), 1 << 30, "centre_bias");
    data->centre_start = starts(layer.centre, blocks, layer.inputs / 4);
    layer.centre_bias = data->centre_bias.data();
  }
  const std::vector<std::int32_t> order = take(a.order, layer.width, "order");
  for (int p = 0; p < 2; ++p) {
    data->order[p].assign(order.begin() + std::ptrdiff_t(p ? n[0] : 0),
                          order.begin() + std::ptrdiff_t(p ? layer.width : n[0]));
    std::vector<bool> seen(n[p]);
    for (std::int32_t c : data->order[p]) {
      if (c < 0 || std::size_t(c) >= n[p] || seen[std::size_t(c)])
        throw std::invalid_argument("order is no permutation");
      seen[std::size_t(c)] = true;
    }
  }
  // The two of a pair stand side by side, before what is not turned.
  for (std::size_t i = 0; i < 2 * a.k_heads * pairs; i += 2) {
    const auto c = std::size_t(data->order[0][i]), d = std::size_t(data->order[0][i + 1]);
    if (c % a.k_dim >= pairs || d != c + pairs)
      throw std::invalid_argument("order tears a pair apart");
  }
  data->step = take(a.step, pairs, "step");
  data->unit = take(a.unit, layer.width, "unit");
  for (std::int8_t u : data->unit)
    if (u < -120 || u > 60) throw std::invalid_argument("a unit is out of bounds");
  data->mean = take(a.mean, layer.width, "mean");
  data->input_scale = take(a.input_scale, layer.width, "input_scale");
  data->density = take(a.density, layer.width, "density");
  for (std::uint8_t d : data->density)
    if (d >= shapes_) throw std::invalid_argument("no such density");
  if (a.has_table) {
    const std::size_t entries = a.table16.size + a.table8.size,
                      width = std::max<std::size_t>(layer.width, 1);
    if ((a.table16.size && a.table8.size) || entries % width)
      throw std::invalid_argument("a token table of another size");
    data->known = entries / width;
    // An empty table is one all the same: it has its classes.
    static constexpr std::int8_t kNothing = 0;
    layer.table16 = a.table16.size ? a.table16.data : nullptr;
    layer.table8 = a.table16.size ? nullptr : a.table8.size ? a.table8.data : &kNothing;
  }
  const std::size_t classes = layer.regions * (a.has_table ? 2 : 1);
  data->inverse = take(a.inverse, classes * layer.width, "inverse");
  data->pair_inverse =
      take(a.pair_inverse, classes * a.k_heads * pairs * 2 * kAngles, "pair_inverse");
  data->pair_slope = take(a.pair_slope, classes * a.k_heads * pairs * kAngles, "pair_slope");
  check_bounds(data->inverse, 1, 1 << 26, "an inverse");
  check_bounds(data->pair_inverse, 1, 1 << 26, "an inverse");
  for (int p = 0; p < 2; ++p) {
    Part& part = layer.part[p];
    part.heads = p ? a.v_heads : a.k_heads;
    part.dim = p ? a.v_dim : a.k_dim;
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
  for (std::size_t l : a.inputs) layers_[l]->last_use = layers_.size();
  layers_.push_back(std::move(data));
}

const Layer& ProfileModel::layer(std::size_t i) const {
  if (i >= layers_.size()) throw std::invalid_argument("the profile has no such layer");
  return layers_[i]->layer;
}
void ProfileModel::put_in_order(std::size_t i) const {
  Data& data = *layers_[i];
  std::call_once(data.ordering, [&] {
    Layer& layer = data.layer;
    data.orders.reserve(2 * layer.regions + 1);
    for (Region& region : data.regions) {
      region.weight_order =
          data.orders.emplace_back(region.weight, layer.blocks, layer.inputs / 4).of();
      region.within_order =
          data.orders.emplace_back(region.within, layer.blocks, layer.blocks, layer.reads).of();
    }
    if (layer.regions > 1)
      layer.centre_order =
          data.orders.emplace_back(layer.centre, up4(layer.regions) / 4, layer.inputs / 4).of();
  });
}
const std::vector<std::size_t>& ProfileModel::inputs(std::size_t i) const {
  return layers_[i]->inputs;
}
const std::int32_t* ProfileModel::centre_start(std::size_t i) const {
  return layers_[i]->centre_start.data();
}
std::size_t ProfileModel::known(std::size_t i) const { return layers_[i]->known; }
std::size_t ProfileModel::last_use(std::size_t i) const { return layers_[i]->last_use; }
std::size_t ProfileModel::classes(std::size_t i) const {
  const Layer& l = layer(i);
  return l.regions * (l.table16 || l.table8 ? 2 : 1);
}
Model ProfileModel::model() const { return {tables_->of, sine_.data()}; }

// --- a token range -------------------------------------------------------------------------------

Chain::Chain(const ProfileModel& model, std::size_t rows, std::size_t count, std::uint64_t position,
             Form form, Span<std::int32_t> entries)
    : model_(model),
      form_(form),
      total_(rows * count),
      entries_(take(entries, total_, "entries")),
      energy_(total_, kOne),
      entry_(total_),
      at_(total_) {
  if (form.bits() != 8 && form.bits() != 16) throw std::invalid_argument("not 8 or 16 bits");
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

bool Chain::follows(std::size_t layer, int part, std::size_t heads, std::size_t dim) const {
  if (layer != this->layer() || part != this->part()) return false;
  const Part& p = model_.layer(layer).part[part];
  return heads == p.heads && dim == p.dim;
}

template <typename T>
Intervals Chain::measure(const Block<const T>& numbers, std::uint32_t* counts) {
  const Layer& layer = model_.layer(this->layer());
  const Part& p = layer.part[part()];
  const Kernels& kernels = predictive::kernels();
  begin(kernels);
  const std::size_t room = total_ * p.channels() + kTile;
  intervals_.resize(2 * room);
  const Intervals intervals{intervals_.data(), intervals_.data() + room};
  if constexpr (sizeof(T) == 1)
    kernels.model8(model_.model(), layer, part(), form_, tokens_, numbers, intervals, counts);
  else kernels.model16(model_.model(), layer, part(), form_, tokens_, numbers, intervals, counts);
  end();
  return intervals;
}

void Chain::keep() {
  kept_.push_back({(next_ - 1) / 2, int((next_ - 1) % 2), std::move(intervals_), at_, tiles_});
  intervals_ = {};
}

std::vector<std::vector<std::uint8_t>> Chain::encode() {
  std::vector<std::vector<std::uint8_t>> parts(kept_.size());
  if (kept_.empty()) return parts;
  const std::size_t lanes = model_.layer(0).lanes;
  std::vector<std::uint64_t> states(total_ * lanes, kLow);
  std::vector<std::uint32_t> words;
  for (std::size_t i = kept_.size(); i-- > 0;) {
    Kept& kept = kept_[i];
    const Layer& layer = model_.layer(kept.layer);
    const Part& part = layer.part[kept.part];
    const std::size_t room = kept.intervals.size() / 2, first = i ? 0 : round16(8 * states.size());
    const std::size_t streams =
        kept.tiles.empty() ? 0 : kept.tiles.back().stream + kept.tiles.back().streams();
    std::vector<std::uint16_t> counts(round16(2 * streams * lanes) / 2);
    // At most a word for each number, and one that is written before it is known whether it counts.
    words.resize(total_ * part.channels() + 1);
    const std::size_t n = kvzip::predictive::encode(
        part, form_, layer.group, lanes, kept.at.data(), kept.tiles.data(), kept.tiles.size(),
        {kept.intervals.data(), kept.intervals.data() + room}, states.data(), counts.data(),
        words.data() + words.size());
    std::vector<std::uint8_t>& out = parts[i];
    out.resize(first + 2 * counts.size() + 4 * n);
    if (first) std::memcpy(out.data(), states.data(), 8 * states.size());
    std::copy_n(reinterpret_cast<const std::uint8_t*>(counts.data()), 2 * counts.size(),
                out.data() + first);
    std::copy_n(reinterpret_cast<const std::uint8_t*>(words.data() + words.size() - n), 4 * n,
                out.data() + first + 2 * counts.size());
    kept = {};
  }
  kept_.clear();
  return parts;
}

// The states that a token range's first coded part begins with.
bool Chain::take_states(Span<std::uint8_t>* bytes, std::size_t lanes) {
  const std::size_t size = 8 * total_ * lanes, all = round16(size);
  if (bytes->size < all ||
      !std::all_of(bytes->data + size, bytes->data + all, [](std::uint8_t b) { return b == 0; }))
    return false;
  states_.resize(total_ * lanes);
  if (size) std::memcpy(states_.data(), bytes->data, size);
  bytes->data += all;
  bytes->size -= all;
  return std::all_of(states_.begin(), states_.end(),
                     [](std::uint64_t x) { return x >= kLow && !(x >> 63); });
}

template <typename T>
bool Chain::decode(Span<std::uint8_t> bytes, const Block<T>& numbers) {
  const Layer& layer = model_.layer(this->layer());
  const std::size_t lanes = layer.lanes;
  if (states_.empty() && !take_states(&bytes, lanes)) return false;
  const Kernels& kernels = predictive::kernels();
  begin(kernels);
  const std::size_t streams = this->streams() * lanes, counts = round16(2 * streams);
  if (bytes.size < counts) return false;
  std::vector<const std::uint8_t*> word(streams), last(streams);
  const std::uint8_t *next = bytes.data + counts, *const stop = bytes.data + bytes.size;
  for (std::size_t s = 0; s < streams; ++s) {
    std::uint16_t n;
    std::memcpy(&n, bytes.data + 2 * s, 2);
    if (std::size_t(stop - next) < 4u * n) return false;
    word[s] = next;
    last[s] = next += 4 * n;
  }
  for (std::size_t i = 2 * streams; i < counts; ++i)
    if (bytes.data[i]) return false;
  if (next != stop) return false;
  const Coded coded{states_.data(), word.data(), last.data()};
  bool good;
  if constexpr (sizeof(T) == 1)
    good = kernels.decode8(model_.model(), layer, part(), form_, tokens_, numbers, coded);
  else good = kernels.decode16(model_.model(), layer, part(), form_, tokens_, numbers, coded);
  end();
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
void Chain::pack(const Tile& tile, std::uint32_t* to) const {
  for (std::size_t l : model_.inputs(layer())) {
    const std::size_t blocks = model_.layer(l).blocks;
    const std::uint32_t* from = inputs_.at(l).data();
    for (std::size_t t = 0; t < kTile; ++t) {
      const std::uint32_t* row =
          from + at_[tile.start + std::min<std::size_t>(t, tile.count - 1)] * blocks;
      for (std::size_t b = 0; b < blocks; ++b) to[b * kTile + t] = row[b];
    }
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
  std::vector<std::uint32_t> packed(layer.inputs / 4 * kTile);
  for (const Tile& tile : tiles_) {
    pack(tile, packed.data());
    std::int32_t best[kTile];
    alignas(64) std::int32_t sums[4][kTile];
    std::uint8_t* const found = region.data() + tile.start;
    for (std::size_t r = 0; r < layer.regions; ++r) {
      if (r % 4 == 0)
        kernels.products(packed.data(), layer.centre + r * layer.inputs, layer.inputs / 4,
                         kernels.in_order ? layer.centre_order + r / 4 : nullptr,
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

void Chain::begin(const Kernels& kernels) {
  const Layer& layer = model_.layer(this->layer());
  if (kernels.in_order) model_.put_in_order(this->layer());
  if (part() == 1) return;
  arrange(layer, kernels);
  const std::size_t size = layer.inputs / 4 * kTile, own = layer.blocks * kTile;
  packed_.resize(tiles_.size() * size);
  for (std::size_t i = 0; i < tiles_.size(); ++i) pack(tiles_[i], packed_.data() + i * size);
  residual_.assign(tiles_.size() * own, 0x80808080u);
  output_.assign(tiles_.size() * own, 0x80808080u);
  turn_.resize(3 * layer.part[0].pairs * kTile);
  const auto known = std::int64_t(model_.known(this->layer()));
  for (std::size_t t = 0; t < total_; ++t) entry_[t] = entries_[t] < known ? entries_[t] : -1;
  tokens_.tiles = tiles_.size();
  tokens_.tile = tiles_.data();
  tokens_.input = packed_.data();
  tokens_.residual = residual_.data();
  tokens_.output = output_.data();
  tokens_.turn = turn_.data();
}

void Chain::end() {
  const std::size_t i = layer();
  if (next_++ % 2 == 0) return;
  if (model_.last_use(i) > i) {
    const std::size_t blocks = model_.layer(i).blocks;
    std::vector<std::uint32_t>& rows = inputs_[i];
    rows.resize(total_ * blocks);
    for (std::size_t n = 0; n < tiles_.size(); ++n)
      for (std::size_t t = 0; t < tiles_[n].count; ++t) {
        std::uint32_t* const row = rows.data() + at_[tiles_[n].start + t] * blocks;
        for (std::size_t b = 0; b < blocks; ++b) row[b] = output_[(n * blocks + b) * kTile + t];
      }
  }
  for (auto it = inputs_.begin(); it != inputs_.end();)
    it = model_.last_use(it->first) <= i ? inputs_.erase(it) : std::next(it);
}

template <typename T>
double bits_by_channel(const Block<const T>& numbers, std::size_t rows, std::size_t heads,
                       std::size_t tokens, std::size_t dim, Form form) {
  // The low bits of the exponent are enough for a bound, and their counts stay in the first-level
  // cache.
  constexpr std::size_t symbols = 32;
  std::vector<std::uint32_t> counts(dim * symbols);
  const double each = double(rows * tokens);
  double bits = each * double(heads * dim) * form.mantissa_bits;
  for (std::size_t h = 0; h < heads; ++h) {
    std::fill(counts.begin(), counts.end(), 0);
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t t = 0; t < tokens; ++t) {
        const T* at = numbers.data + std::ptrdiff_t(r) * numbers.row_stride +
                      std::ptrdiff_t(h) * numbers.head_stride +
                      std::ptrdiff_t(t) * numbers.token_stride;
        for (std::size_t d = 0; d < dim; ++d)
          ++counts[d * symbols +
                   (std::size_t(at[std::ptrdiff_t(d) * numbers.dim_stride]) >> form.mantissa_bits) %
                       symbols];
      }
    for (std::uint32_t n : counts)
      if (n) bits += n * std::log2(each / n);
  }
  return bits;
}
template double bits_by_channel(const Block<const std::uint8_t>&, std::size_t, std::size_t,
                                std::size_t, std::size_t, Form);
template double bits_by_channel(const Block<const std::uint16_t>&, std::size_t, std::size_t,
                                std::size_t, std::size_t, Form);
template double bits_by_channel(const Block<const std::uint32_t>&, std::size_t, std::size_t,
                                std::size_t, std::size_t, Form);

#define KVZIP_INSTANTIATE(T)                                                \
  template Intervals Chain::measure(const Block<const T>&, std::uint32_t*); \
  template bool Chain::decode(Span<std::uint8_t>, const Block<T>&);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::predictive
