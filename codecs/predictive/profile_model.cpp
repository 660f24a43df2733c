#include "predictive/profile_model.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "native/float_environment.hpp"

namespace kvzip::predictive {
namespace {

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
        of_(blocks),
        reach_(groups),
        by_reach_(groups) {
    std::uint16_t* to = group_.data();
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::size_t n = reads ? reads[b] : groups;
      of_[b] = {to, arrange(matrix + b * groups * 16, n, to)};
      to += n;
    }
  }
  const Order* of() const { return of_.data(); }

 private:
  // 255 times that fits 16 bits.
  static constexpr int kMost = 128;
  // With how many, of those that reach least, a group is tried.
  static constexpr std::size_t kTries = 8;

  // The sums of weights of either sign that a group adds to those of 16 bits, each by itself, and
  // the largest.
  struct Reach {
    typedef std::int16_t Sums __attribute__((vector_size(16)));
    Sums up, down;
    int most = 0;

    Reach() = default;
    explicit Reach(const std::int8_t* w) {
      typedef std::uint16_t Pairs __attribute__((vector_size(16)));
      Pairs pairs;
      std::memcpy(&pairs, w, sizeof pairs);
      const Sums first = (Sums)(pairs << 8) >> 8, second = (Sums)pairs >> 8;
      up = (first & (first > 0)) + (second & (second > 0));
      down = up - first - second;
      for (int i = 0; i < 8; ++i) most = std::max({most, int(up[i]), int(down[i])});
    }
    bool fits(const Reach& other) const {
      const Sums beyond = (up + other.up > kMost) | (down + other.down > kMost);
      std::uint64_t any[2];
      std::memcpy(any, &beyond, sizeof any);
      return !(any[0] | any[1]);
    }
  };

  // Those that reach furthest go with those that reach least. Returns how many pairs there are.
  std::uint32_t arrange(const std::int8_t* w, std::size_t n, std::uint16_t* to) {
    std::size_t count[257] = {};
    for (std::size_t g = 0; g < n; ++g) ++count[1 + (reach_[g] = Reach(w + g * 16)).most];
    for (int r = 0; r < 256; ++r) count[r + 1] += count[r];
    std::uint16_t* const waiting = by_reach_.data();
    for (std::size_t g = 0; g < n; ++g) waiting[count[reach_[g].most]++] = std::uint16_t(g);
    std::uint16_t* const begin = to;
    std::uint16_t* alone = to + n;
    for (std::size_t low = 0, high = n; low < high;) {
      const std::uint16_t most = waiting[--high];
      const Reach& reach = reach_[most];
      std::size_t other = low;
      const std::size_t end = reach.most > kMost ? low : std::min(high, low + kTries);
      while (other < end && !reach.fits(reach_[waiting[other]])) ++other;
      if (other == end) {
        *--alone = most;
        continue;
      }
      *to++ = waiting[other];
      *to++ = most;
      std::copy_backward(waiting + low, waiting + other, waiting + other + 1);
      ++low;
    }
    return std::uint32_t(to - begin) / 2;
  }

  std::vector<std::uint16_t> group_;
  std::vector<Order> of_;
  // Of the block that is arranged: each group's reach, and the groups from the least reach up.
  std::vector<Reach> reach_;
  std::vector<std::uint16_t> by_reach_;
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
  std::vector<float> search, search_four;

  Tables(const std::uint32_t* shares, std::size_t shapes) {
    const DefaultEnvironment environment;
    for (std::size_t s = 0; s < shapes; ++s, shares += kCells + 1) {
      std::int32_t edge[kCells + 1];
      for (int i = 0; i <= kCells; ++i)
        edge[i] = std::int32_t(std::uint64_t(shares[i]) * std::uint64_t(kHalf) >> 23);
      for (int i = 0; i < kCells; ++i) {
        from.push_back(edge[i]);
        rise.push_back(edge[i + 1] - edge[i]);
      }
      const auto cell_at = [&](double tail) {
        const double share = kHalf - tail;
        const int c = int(std::upper_bound(edge, edge + kCells, share) - edge) - 1;
        const double in = c < 0 ? 0 : (share - edge[c]) / std::max(1, edge[c + 1] - edge[c]);
        // Within the cells that there are, whatever is rounded.
        return std::clamp(c + std::min(1.0, in), 0.01, kCells - 0.01);
      };
      search.resize(search.size() + 4 * kSteps);
      search_four.resize(search_four.size() + 4 * kSteps);
      for (int i = 0; i < kSteps; ++i) {
        const auto at = [&](double x) { return cell_at(std::ldexp(x + i % 2 * 0.5, 7 + i / 2)); };
        const std::array<double, 4> of = cubic(at, 0.01, kCells - 0.01);
        const int place = (2 * (127 + 7) + i) % kSteps;
        for (int k = 0; k < 4; ++k) {
          const auto a = float(of[std::size_t(k)] + (k ? 0 : kFirstCell));
          search[search.size() - 4 * kSteps + std::size_t(k * kSteps + place)] = a;
          search_four[search.size() - 4 * kSteps + std::size_t(4 * place + k)] = a;
        }
      }
    }
    of.from = from.data();
    of.rise = rise.data();
    of.search = search.data();
    of.search_four = search_four.data();
    for (std::size_t i = 0; i < from.size(); ++i)
      from_rise.insert(from_rise.end(), {from[i], rise[i]});
    of.from_rise = from_rise.data();
  }

 private:
  // A polynomial that is about f(x) for x in [1, 1.5], and surely within those bounds.
  template <class Function>
  static std::array<double, 4> cubic(const Function& f, double low, double high) {
    // Through four places, by divided differences.
    double x[4], y[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = 1.25 + 0.25 * std::cos((2 * i + 1) * 3.14159265358979 / 8);
      y[i] = f(x[i]);
    }
    for (int step = 1; step < 4; ++step)
      for (int i = 3; i >= step; --i) y[i] = (y[i] - y[i - 1]) / (x[i] - x[i - step]);
    std::array<double, 4> of{};
    for (int i = 3; i >= 0; --i) {
      for (std::size_t k = 3; k > 0; --k) of[k] = of[k - 1] - x[i] * of[k];
      of[0] = y[i] - x[i] * of[0];
    }
    // It is within what Bernstein's polynomials take as coefficients.
    const auto at = [&](double v) { return ((of[3] * v + of[2]) * v + of[1]) * v + of[0]; };
    const auto slope = [&](double v) { return (3 * of[3] * v + 2 * of[2]) * v + of[1]; };
    for (double c : {at(1), at(1) + slope(1) / 6, at(1.5) - slope(1.5) / 6, at(1.5)})
      if (c < low || c > high) return {f(1) - 2 * (f(1.5) - f(1)), 2 * (f(1.5) - f(1)), 0, 0};
    return of;
  }
};

// A layer, the arrays of it that are copied, and what is made of the others. Each `set_` checks
// what it takes.
struct ProfileModel::Data {
  void set_sizes(const LayerArrays& arrays);
  void set_regions(const LayerArrays& arrays);
  void set_order(const LayerArrays& arrays);
  void set_channels(const LayerArrays& arrays, std::size_t shapes);
  void set_token_table(const LayerArrays& arrays);
  void set_deviations(const LayerArrays& arrays);

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

void ProfileModel::Data::set_sizes(const LayerArrays& a) {
  if (std::max({a.k_heads, a.k_dim, a.v_heads, a.v_dim}) > 1u << 16)
    throw std::invalid_argument("more than 65,536 channels in a layer");
  const std::size_t channels[2] = {a.k_heads * a.k_dim, a.v_heads * a.v_dim};
  layer.width = channels[0] + channels[1];
  if (layer.width > 1u << 16) throw std::invalid_argument("more than 65,536 channels in a layer");
  layer.blocks = up4(layer.width) / 4;
  layer.group = a.group;
  layer.lanes = a.lanes;
  if (a.group < 2 || a.group > kMostGroup || a.group % 2)
    throw std::invalid_argument("a group is of 2, 4 ... 64 channels");
  if (a.lanes < 1 || a.lanes > a.group / 2)
    throw std::invalid_argument("1 lane, or at most as many as a group has pairs");
  // The words of a stream are counted in 16 bits; a number takes one at most.
  const std::size_t of_a_lane = 2 * ((a.group / 2 + a.lanes - 1) / a.lanes);
  for (std::size_t n : channels)
    if (kStream * of_a_lane * ((n + a.group - 1) / a.group) > 65535)
      throw std::invalid_argument("too few lanes for so many channels");
  const std::size_t pairs = a.step.size;
  if (2 * pairs > a.k_dim) throw std::invalid_argument("more pairs than dimensions");
  layer.regions = a.regions;
  if (layer.regions < 1 || layer.regions > 256) throw std::invalid_argument("1 to 256 regions");
  layer.part[0] = {a.k_heads, a.k_dim, pairs, 0, nullptr, nullptr};
  layer.part[1] = {a.v_heads, a.v_dim, 0, channels[0], nullptr, nullptr};
}

// The predictors of each region, and how a region is chosen.
void ProfileModel::Data::set_regions(const LayerArrays& a) {
  const std::size_t all = layer.regions * layer.width, keys = layer.part[1].first;
  const std::int32_t *bias = look(a.bias, all, "bias"),
                     *scale = look(a.weight_scale, all, "weight_scale"),
                     *within_scale = look(a.within_scale, all, "within_scale");
  const std::size_t size = layer.blocks * layer.inputs * 4,
                    triangle = layer.blocks * layer.blocks * 16;
  const std::int8_t *weight = look(a.weight, layer.regions * size, "weight"),
                    *within = look(a.within, layer.regions * triangle, "within");
  reads = reads_of(layer, keys);
  layer.reads = reads.data();
  for (std::size_t r = 0; r < layer.regions; ++r) {
    check_groups(within + r * triangle, layer, keys);
    start.push_back(starts(weight + r * size, layer.blocks, layer.inputs / 4));
    start.push_back(starts(within + r * triangle, layer.blocks, layer.blocks, layer.reads));
    regions.push_back({bias + r * layer.width, weight + r * size, scale + r * layer.width,
                       within + r * triangle, within_scale + r * layer.width, start[2 * r].data(),
                       start[2 * r + 1].data()});
  }
  layer.region = regions.data();
  if (layer.regions == 1) return;
  const std::size_t blocks = up4(layer.regions) / 4;
  layer.centre = look(a.centre, blocks * layer.inputs * 4, "centre");
  centre_bias = take(a.centre_bias, layer.regions, "centre_bias");
  check_bounds(centre_bias, -(1 << 30), 1 << 30, "centre_bias");
  centre_start = starts(layer.centre, blocks, layer.inputs / 4);
  layer.centre_bias = centre_bias.data();
}

void ProfileModel::Data::set_order(const LayerArrays& a) {
  const std::vector<std::int32_t> both = take(a.order, layer.width, "order");
  for (int p = 0; p < 2; ++p) {
    Part& part = layer.part[p];
    const auto first = both.begin() + std::ptrdiff_t(part.first);
    order[p].assign(first, first + std::ptrdiff_t(part.channels()));
    std::vector<bool> seen(part.channels());
    for (std::int32_t c : order[p]) {
      if (c < 0 || std::size_t(c) >= seen.size() || seen[std::size_t(c)])
        throw std::invalid_argument("order is no permutation");
      seen[std::size_t(c)] = true;
    }
    part.order = order[p].data();
  }
  // The two of a pair stand one after the other, before what is not turned.
  Part& keys = layer.part[0];
  keys.side_by_side = keys.pairs > 1 && keys.heads && order[0][1] == order[0][0] + 1;
  for (std::size_t i = 0; i < keys.turned(); i += 2) {
    const auto c = std::size_t(order[0][i]), d = std::size_t(order[0][i + 1]);
    const std::size_t pair = keys.pair_of(c);
    if (pair >= keys.pairs || c % keys.dim != keys.first_of(pair) || d != c + keys.apart())
      throw std::invalid_argument("order tears a pair apart");
  }
  step = take(a.step, keys.pairs, "step");
  for (Part& part : layer.part) part.step = step.data();
}

// What each channel has for itself; `shapes`: how many densities there are.
void ProfileModel::Data::set_channels(const LayerArrays& a, std::size_t shapes) {
  unit = take(a.unit, layer.width, "unit");
  for (std::int8_t u : unit)
    if (u < -120 || u > 60) throw std::invalid_argument("a unit is out of bounds");
  mean = take(a.mean, layer.width, "mean");
  input_scale = take(a.input_scale, layer.width, "input_scale");
  density = take(a.density, layer.width, "density");
  for (std::uint8_t d : density)
    if (d >= shapes) throw std::invalid_argument("no such density");
  layer.unit = unit.data();
  layer.mean = mean.data();
  layer.input_scale = input_scale.data();
  layer.density = density.data();
}

void ProfileModel::Data::set_token_table(const LayerArrays& a) {
  if (!a.has_table) return;
  const std::size_t entries = a.table16.size + a.table8.size,
                    width = std::max<std::size_t>(layer.width, 1);
  if ((a.table16.size && a.table8.size) || entries % width)
    throw std::invalid_argument("a token table of another size");
  known = entries / width;
  // An empty table is one all the same: it has its classes.
  static constexpr std::int8_t kNothing = 0;
  layer.table16 = a.table16.size ? a.table16.data : nullptr;
  layer.table8 = a.table16.size ? nullptr : a.table8.size ? a.table8.data : &kNothing;
}

// How far numbers lie from where they are expected, class by class.
void ProfileModel::Data::set_deviations(const LayerArrays& a) {
  const std::size_t classes = layer.regions * (a.has_table ? 2 : 1);
  const std::size_t pairs = layer.part[0].heads * layer.part[0].pairs;
  inverse = take(a.inverse, classes * layer.width, "inverse");
  pair_inverse = take(a.pair_inverse, classes * pairs * 2 * kAngles, "pair_inverse");
  pair_slope = take(a.pair_slope, classes * pairs * kAngles, "pair_slope");
  check_bounds(inverse, 1, 1 << 26, "an inverse");
  check_bounds(pair_inverse, 1, 1 << 26, "an inverse");
  layer.inverse = inverse.data();
  layer.pair_inverse = pair_inverse.data();
  layer.pair_slope = pair_slope.data();
}

void ProfileModel::add_layer(const LayerArrays& a) {
  auto data = std::make_unique<Data>();
  Layer& layer = data->layer;
  data->set_sizes(a);
  if (!layers_.empty() &&
      (a.group != layers_[0]->layer.group || a.lanes != layers_[0]->layer.lanes))
    throw std::invalid_argument("groups and lanes are those of all layers");
  data->inputs = a.inputs;
  for (std::size_t l : a.inputs) {
    if (l >= layers_.size()) throw std::invalid_argument("an input is no earlier layer");
    layer.inputs += up4(layers_[l]->layer.width);
    // Sums of products of a byte and a weight must fit 32 bits.
    if (layer.inputs > 1u << 16) throw std::invalid_argument("more than 65,536 inputs");
  }
  data->set_regions(a);
  data->set_order(a);
  data->set_channels(a, shapes_);
  data->set_token_table(a);
  data->set_deviations(a);
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
    data.orders.clear();  // a fork may have found it half filled
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

}  // namespace kvzip::predictive
