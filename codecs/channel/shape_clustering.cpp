#include "channel/shape_clustering.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "channel/kernels.hpp"

namespace kvzip::channel {
namespace {

// Counts are looked at through a window of exponents around their mean: a number far above its
// channel's mean is rare, far below less so, as a density that is flat near zero halves the
// probability with each exponent.
constexpr int kWindow = 32, kMean = 22, kCells = 2 * kWindow;
// Costs are in 1/256 bit. A cell outside of a table costs an escape and its value; a table of its
// own, what it takes in the file.
constexpr int kBit = 256, kEscapeCost = 17 * kBit, kTableCost = 150 * kBit;
constexpr int kMostShift = 2;  // of a channel against a group, in exponents
constexpr int kCandidates = 6;

// log2(n) in 1/256 bit, within one: exact for powers of two, linear between 256ths of an octave.
class Log2 {
 public:
  Log2() noexcept {
    for (int i = 0; i < 256; ++i)
      fraction_[i] = std::int16_t(std::lround(kBit * std::log2(1 + i / 256.0)));
    for (std::uint32_t n = 1; n < kSmall; ++n) small_[n] = std::int16_t(of(n));
  }
  int operator()(std::uint32_t n) const { return n < kSmall ? small_[n] : of(n); }  // n > 0

 private:
  static constexpr std::uint32_t kSmall = 2048;  // most counts are less

  int of(std::uint32_t n) const {
    const int top = 31 - __builtin_clz(n);
    return top * kBit + fraction_[(std::uint64_t(n) << 8 >> top) - 256];
  }

  std::int16_t fraction_[256], small_[kSmall];
};
const Log2 log2_of;

// Counts of positive, then of negative numbers, and how many have no cell; scaled to 15 bits.
struct Cells {
  alignas(16) std::int16_t n[2][kWindow] = {};
  int first = 0, end = 0;  // of those that are not zero
  std::int32_t outside = 0, total = 0;
};

struct Seen {
  Cells cells;
  int start;    // exponent of cell 0
  float place;  // what is left of the mean exponent when it is rounded
  float spread, skew;
  std::int64_t own_cost;  // under a table of its own
  double scale;           // numbers that a count of one stands for
};

// Exponents from `first` on, less than `end`.
struct Range {
  int first, end;
};

// `likely`: where a channel's exponents lie, probably; then where they do. That all of its
// `numbers` were found tells that there are no others, without reading where they could be.
Seen look(const std::uint32_t* counts, int exponent_bits, std::uint64_t numbers, Range* likely) {
  const int exponents = 1 << exponent_bits;
  std::uint64_t total = 0, sum = 0, squares = 0, positive = 0;
  Range found{exponents, 0}, read = *likely;
  const auto take = [&](int e) {
    const std::uint64_t n = std::uint64_t(counts[e]) + counts[exponents + e];
    if (!n) return;
    total += n;
    sum += n * std::uint64_t(e);
    squares += n * std::uint64_t(e) * std::uint64_t(e);
    positive += counts[e];
    found.first = std::min(found.first, e);
    found.end = std::max(found.end, e + 1);
  };
  for (int e = read.first; e < read.end; ++e) take(e);
  while (total < numbers && (read.first > 0 || read.end < exponents)) {
    if (read.first > 0) take(--read.first);
    if (read.end < exponents) take(read.end++);
  }
  *likely = found;
  const double mean = double(sum) / double(total);
  Seen seen{};
  seen.start = int(std::lround(mean)) - kMean;
  seen.place = float(mean - double(std::lround(mean)));
  seen.spread = float(std::sqrt(std::max(0.0, double(squares) / double(total) - mean * mean)));
  seen.skew = float(2 * double(positive) / double(total) - 1);
  const std::uint64_t divisor = total / 32767 + 1;
  seen.scale = double(divisor);
  Cells& cells = seen.cells;
  cells.total = std::int32_t((total + divisor - 1) / divisor);
  cells.outside = cells.total;
  const int all = log2_of(std::uint32_t(cells.total));
  cells.first = std::max(0, found.first - seen.start);
  cells.end = std::min(kWindow, found.end - seen.start);
  for (int sign = 0; sign < 2; ++sign)
    for (int i = cells.first; i < cells.end; ++i) {
      const std::uint64_t n = counts[sign * exponents + seen.start + i];
      if (!n) continue;
      const auto scaled = std::int16_t(divisor == 1 ? n : std::max<std::uint64_t>(1, n / divisor));
      cells.n[sign][i] = scaled;
      cells.outside -= scaled;
      seen.own_cost += std::int64_t(scaled) * (all - log2_of(std::uint32_t(scaled)));
    }
  cells.outside = std::max(0, cells.outside);
  seen.own_cost += std::int64_t(cells.outside) * kEscapeCost;
  return seen;
}

// A shape that channels join, with what each cell costs under it.
struct Group {
  // With room for what a shift moves out of the window.
  std::uint32_t sum[2][kWindow + 2 * kMostShift] = {}, outside = 0, total = 0;
  std::int16_t cost[2][kWindow + 2 * kMostShift];
  int first = kWindow, end = 0;  // of the cells that are not zero
  float place, spread, skew;
  unsigned joined = 0;

  explicit Group(const Seen& seen) : place(seen.place), spread(seen.spread), skew(seen.skew) {
    for (auto& row : cost) std::fill(std::begin(row), std::end(row), std::int16_t(kEscapeCost));
  }
  void clear() {
    for (auto& row : sum) std::fill(std::begin(row), std::end(row), 0);
    outside = total = 0;
  }
  void add(const Cells& cells, int shift, bool flip) {
    for (int sign = 0; sign < 2; ++sign) {
      const std::int16_t* n = cells.n[sign ^ int(flip)];
      std::uint32_t* const to = sum[sign] + kMostShift + shift;
      for (int i = 0; i < kWindow; ++i) to[i] += std::uint32_t(n[i]);
    }
    first = std::max(0, std::min(first, cells.first + shift));
    end = std::min(kWindow, std::max(end, cells.end + shift));
    outside += std::uint32_t(cells.outside);
    total += std::uint32_t(cells.total);
  }
  // The sums of the window's cells; returns how many numbers lie outside of it.
  std::uint32_t inside(std::uint32_t cells[2][kWindow]) const {
    std::uint32_t moved = 0;
    for (int sign = 0; sign < 2; ++sign) {
      const std::uint32_t *from = sum[sign], *const end = std::end(sum[sign]);
      std::copy_n(from + kMostShift, kWindow, cells[sign]);
      for (int i = 0; i < kMostShift; ++i) moved += from[i] + end[-1 - i];
    }
    return outside + moved;
  }
  void price() {
    const int all = log2_of(total + 1);
    for (int sign = 0; sign < 2; ++sign)
      for (int i = first; i < end; ++i) {
        const std::uint32_t n = sum[sign][kMostShift + i];
        cost[sign][kMostShift + i] =
            std::int16_t(n ? std::min(all - log2_of(n), 10 * kBit) : kEscapeCost);
      }
  }
  // Cost of a channel's numbers, had it joined with that shift (at most kMostShift) and flip.
  std::int64_t of(const Cells& cells, int shift, bool flip) const {
    std::int32_t inside = 0;
    for (int sign = 0; sign < 2; ++sign) {
      const std::int16_t* n = cells.n[sign ^ int(flip)];
      const std::int16_t* c = cost[sign] + kMostShift + shift;
      for (int i = 0; i < kWindow; ++i) inside += std::int32_t(n[i]) * c[i];
    }
    return inside + std::int64_t(cells.outside) * kEscapeCost;
  }
};

struct Choice {
  std::size_t group = 0;
  int shift = 0;
  bool flip = false;
  std::int64_t cost = INT64_MAX;
};

// The groups that look like a channel, of the first `seen`.
struct Near {
  std::uint16_t group[kCandidates];
  float distance[kCandidates];
  std::size_t count = 0, seen = 0;
};

// Mean exponent, spread and skew of the groups, which tell most of a shape.
class Looks {
 public:
  void add(const Seen& seen) {
    place_.push_back(seen.place);
    spread_.push_back(seen.spread);
    skew_.push_back(std::abs(seen.skew));
    distance_.push_back(0);
  }

  // Looks at the groups that have come since.
  void find(const Seen& seen, Near* near) {
    const float skew = std::abs(seen.skew);
    const std::size_t first = near->seen, n = near->seen = place_.size();
    for (std::size_t g = first; g < n; ++g) {
      const float place = std::abs(place_[g] - seen.place);
      distance_[g] = std::min(place, 1 - place) + std::abs(spread_[g] - seen.spread) +
                     2 * std::abs(skew_[g] - skew);
    }
    for (std::size_t g = first; g < n; ++g) {
      const float distance = distance_[g];
      if (near->count == kCandidates && distance >= near->distance[kCandidates - 1]) continue;
      std::size_t i = near->count < kCandidates ? near->count++ : kCandidates - 1;
      for (; i > 0 && distance < near->distance[i - 1]; --i) {
        near->distance[i] = near->distance[i - 1];
        near->group[i] = near->group[i - 1];
      }
      near->distance[i] = distance;
      near->group[i] = std::uint16_t(g);
    }
  }

 private:
  std::vector<float> place_, spread_, skew_, distance_;
};

// The one of them that codes the channel in the fewest bits.
Choice best(const std::vector<Group>& groups, const Near& near, const Seen& seen) {
  Choice choice;
  for (std::size_t k = 0; k < near.count; ++k) {
    const Group& group = groups[near.group[k]];
    const bool flip = group.skew * seen.skew < 0;
    const float lag = seen.place - group.place;
    const int nearest = int(lag >= 0.5f) - int(lag <= -0.5f);  // places are at most 1/2 from 0
    for (int shift = nearest - 1; shift <= nearest + 1; ++shift) {
      if (std::abs(float(shift) - lag) > 0.75f) continue;
      const std::int64_t cost = group.of(seen.cells, shift, flip);
      if (cost < choice.cost) choice = {near.group[k], shift, flip, cost};
    }
  }
  return choice;
}

}  // namespace

Shapes choose_shapes(const std::vector<const std::uint32_t*>& counts, std::uint64_t numbers,
                     int exponent_bits, bool any_value) {
  const std::size_t channels = counts.size();
  std::vector<Seen> seen(channels);
  std::vector<Group> groups;
  Looks looks;
  std::vector<Near> near(channels);
  std::vector<Choice> choices(channels);
  Range likely{1 << exponent_bits >> 1, 1 << exponent_bits >> 1};
  for (std::size_t c = 0; c < channels; ++c) {
    seen[c] = look(counts[c], exponent_bits, numbers, &likely);
    looks.find(seen[c], &near[c]);
    choices[c] = best(groups, near[c], seen[c]);
    if (choices[c].cost > seen[c].own_cost + kTableCost) {
      groups.emplace_back(seen[c]);
      looks.add(seen[c]);
      choices[c] = {groups.size() - 1, 0, false, 0};
    }
    Group& group = groups[choices[c].group];
    group.add(seen[c].cells, choices[c].shift, choices[c].flip);
    // Prices change less and less; again at 1, 2, 3, 4, 6, 8, 12, 16, ... channels.
    const unsigned joined = ++group.joined,
                   step = joined < 4 ? 1 : 1u << (30 - __builtin_clz(joined));
    if (joined % step == 0) group.price();
  }
  // Again, now that all groups are known.
  for (Group& group : groups) group.price();
  for (std::size_t c = 0; c < channels; ++c) {
    looks.find(seen[c], &near[c]);
    choices[c] = best(groups, near[c], seen[c]);
  }
  for (Group& group : groups) group.clear();
  for (std::size_t c = 0; c < channels; ++c)
    groups[choices[c].group].add(seen[c].cells, choices[c].shift, choices[c].flip);
  Shapes out;
  out.shape.resize(channels);
  out.base.resize(channels);
  std::vector<std::uint16_t> number(groups.size());
  std::vector<std::uint32_t> low(groups.size());
  for (std::size_t g = 0; g < groups.size(); ++g) {
    std::uint8_t levels[kCells], escape;
    std::size_t width;
    std::uint32_t cells[2][kWindow];
    const std::uint32_t outside = groups[g].inside(cells) + any_value;
    if (!choose_levels(cells[0], kWindow, 1u << exponent_bits, outside, levels, &low[g], &width,
                       &escape)) {
      // Numbers so far apart that none is near their mean: all are escapes.
      levels[0] = levels[1] = 0;
      width = escape = 1;
    }
    number[g] = std::uint16_t(out.levels.widths.size());
    out.levels.widths.push_back(std::uint8_t(width - 1));
    out.levels.escapes.push_back(escape);
    out.levels.levels.insert(out.levels.levels.end(), levels, levels + 2 * width);
  }
  for (std::size_t c = 0; c < channels; ++c) {
    const Choice& choice = choices[c];
    out.bits += double(choice.cost) / kBit * seen[c].scale;
    out.shape[c] = number[choice.group];
    const int base = seen[c].start - choice.shift + int(low[choice.group]);
    out.base[c] =
        std::uint16_t((base + (choice.flip ? 1 << exponent_bits : 0)) & ((2 << exponent_bits) - 1));
  }
  return out;
}

}  // namespace kvzip::channel
