#include "channel/shapes.hpp"

#include <algorithm>
#include <cmath>

#include "channel/kernels.hpp"

namespace kvzip::channel {
namespace {

// Counts are looked at through a window of exponents around their mean: a number far above its
// channel's mean is rare, far below less so, as a density that is flat near zero halves the
// probability with each exponent.
constexpr int kWindow = 32, kMean = 22, kCells = 2 * kWindow;
// What a table of its own costs in bits, and a cell outside of one: an escape and its value.
constexpr float kTableBits = 100, kEscapeBits = 17;
constexpr int kCandidates = 12;

struct Cells {
  float n[kCells] = {};  // positive, then negative
  float outside = 0, total = 0;
};

struct Seen {
  Cells cells;
  int start;    // exponent of cell 0
  float place;  // what is left of the mean exponent when it is rounded
  float spread, skew;
};

Seen look(const std::uint32_t* counts, int exponent_bits) {
  const int exponents = 1 << exponent_bits;
  double total = 0, sum = 0, squares = 0, positive = 0;
  for (int e = 0; e < exponents; ++e) {
    const double n = double(counts[e]) + counts[exponents + e];
    total += n;
    sum += n * e;
    squares += n * e * e;
    positive += counts[e];
  }
  const double mean = sum / total;
  Seen seen{};
  seen.start = int(std::lround(mean)) - kMean;
  seen.place = float(mean - std::lround(mean));
  seen.spread = float(std::sqrt(std::max(0.0, squares / total - mean * mean)));
  seen.skew = float(std::abs(2 * positive / total - 1));
  float inside = 0;
  for (int i = 0; i < kWindow; ++i) {
    const int e = seen.start + i;
    if (e < 0 || e >= exponents) continue;
    inside += seen.cells.n[i] = float(counts[e]);
    inside += seen.cells.n[kWindow + i] = float(counts[exponents + e]);
  }
  seen.cells.total = float(total);
  seen.cells.outside = float(total) - inside;
  // The sign that is more frequent counts as positive.
  return seen;
}

// A shape that channels join, with what each cell costs in bits under it.
struct Group {
  Cells sum;
  float cost[kCells];
  float place, spread, skew;

  void add(const Cells& cells, int shift, bool flip) {
    for (int sign = 0; sign < 2; ++sign)
      for (int i = 0; i < kWindow; ++i) {
        const float n = cells.n[(sign ^ int(flip)) * kWindow + i];
        if (i + shift >= 0 && i + shift < kWindow) sum.n[sign * kWindow + i + shift] += n;
        else sum.outside += n;
      }
    sum.outside += cells.outside;
    sum.total += cells.total;
  }
  void price() {
    const float all = std::log2(sum.total + 1);
    for (int i = 0; i < kCells; ++i)
      cost[i] = sum.n[i] > 0 ? std::min(all - std::log2(sum.n[i]), 10.0f) : kEscapeBits;
  }
  float bits(const Cells& cells, int shift, bool flip) const {
    float result = cells.outside * kEscapeBits;
    const int from = std::max(0, -shift), to = std::min(kWindow, kWindow - shift);
    for (int sign = 0; sign < 2; ++sign) {
      const float* n = cells.n + (sign ^ int(flip)) * kWindow;
      const float* c = cost + sign * kWindow + shift;
      for (int i = from; i < to; ++i) result += n[i] * c[i];
      for (int i = 0; i < from; ++i) result += n[i] * kEscapeBits;
      for (int i = to; i < kWindow; ++i) result += n[i] * kEscapeBits;
    }
    return result;
  }
};

float own_bits(const Cells& cells) {
  float result = cells.outside * kEscapeBits;
  const float all = std::log2(cells.total);
  for (float n : cells.n)
    if (n > 0) result += n * (all - std::log2(n));
  return result;
}

struct Choice {
  std::size_t group = 0;
  int shift = 0;
  bool flip = false;
  float bits = 0;
};

// The group that codes a channel in the fewest bits, of those that look like it.
Choice best(const std::vector<Group>& groups, const Seen& seen) {
  Choice choice{0, 0, false, INFINITY};
  // Mean exponent, spread and skew tell most of a shape.
  std::pair<float, std::size_t> near[kCandidates];
  std::size_t count = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    float place = std::abs(groups[g].place - seen.place);
    place = std::min(place, 1 - place);
    const float distance = place + std::abs(groups[g].spread - seen.spread) +
                           2 * std::abs(groups[g].skew - seen.skew);
    const std::pair<float, std::size_t> item{distance, g};
    if (count < kCandidates) near[count++] = item;
    else if (item < near[count - 1]) near[count - 1] = item;
    else continue;
    for (std::size_t i = count - 1; i > 0 && near[i] < near[i - 1]; --i)
      std::swap(near[i], near[i - 1]);
  }
  for (std::size_t k = 0; k < count; ++k) {
    const Group& group = groups[near[k].second];
    const float lag = seen.place - group.place;
    const int nearest = int(std::lround(lag));
    for (int shift = nearest - 1; shift <= nearest + 1; ++shift)
      for (int flip = 0; flip < 2; ++flip) {
        if (std::abs(float(shift) - lag) > 0.75f) continue;
        const float bits = group.bits(seen.cells, shift, flip != 0);
        if (bits < choice.bits) choice = {near[k].second, shift, flip != 0, bits};
      }
  }
  return choice;
}

}  // namespace

Shapes choose_shapes(const std::uint32_t* counts, std::size_t channels, int exponent_bits) {
  const std::size_t values = std::size_t(2) << exponent_bits;
  std::vector<Seen> seen(channels);
  std::vector<Group> groups;
  std::vector<Choice> choices(channels);
  for (std::size_t c = 0; c < channels; ++c) {
    seen[c] = look(counts + c * values, exponent_bits);
    choices[c] = best(groups, seen[c]);
    if (choices[c].bits > own_bits(seen[c].cells) + kTableBits) {
      groups.push_back({{}, {}, seen[c].place, seen[c].spread, seen[c].skew});
      choices[c] = {groups.size() - 1, 0, false, 0};
    }
    groups[choices[c].group].add(seen[c].cells, choices[c].shift, choices[c].flip);
    groups[choices[c].group].price();
  }
  // Once more, now that all groups are known.
  std::vector<Group> last(groups.size());
  for (std::size_t g = 0; g < groups.size(); ++g) last[g] = {{}, {}, groups[g].place, 0, 0};
  for (std::size_t c = 0; c < channels; ++c) {
    choices[c] = best(groups, seen[c]);
    last[choices[c].group].add(seen[c].cells, choices[c].shift, choices[c].flip);
  }
  Shapes out;
  out.shape.resize(channels);
  out.base.resize(channels);
  std::vector<std::uint16_t> number(groups.size());
  std::vector<std::uint32_t> low(groups.size());
  for (std::size_t g = 0; g < groups.size(); ++g) {
    std::uint32_t sums[kCells];
    for (int i = 0; i < kCells; ++i) sums[i] = std::uint32_t(last[g].sum.n[i]);
    std::uint8_t levels[kCells], escape;
    std::size_t width;
    const auto outside = std::uint64_t(last[g].sum.outside);
    if (!choose_levels(sums, kWindow, outside, levels, &low[g], &width, &escape)) continue;
    number[g] = std::uint16_t(out.widths.size());
    out.widths.push_back(std::uint8_t(width - 1));
    out.escapes.push_back(escape);
    out.levels.insert(out.levels.end(), levels, levels + 2 * width);
  }
  for (std::size_t c = 0; c < channels; ++c) {
    const Choice& choice = choices[c];
    out.shape[c] = number[choice.group];
    const int base = seen[c].start - choice.shift + int(low[choice.group]);
    out.base[c] = std::uint16_t((base + (choice.flip ? 1 << exponent_bits : 0)) & int(values - 1));
  }
  return out;
}

}  // namespace kvzip::channel
