// Which scales and codes make numbers: the search, of which spec.md has the reasons.
#include <cmath>
#include <cstring>
#include <vector>

#include "native/grid_round.hpp"
#include "native/simd.hpp"

namespace kvzip::grid {
namespace {

constexpr std::uint32_t kOne = 1u << 23, kTwo = 1u << 24;  // bounds of a scale's significand
constexpr Scale kNeutral{kOne, -23};
// Bounds of a number's interval are counted in 2^-26 of its last place.
constexpr int kFine = 26;
constexpr std::size_t kDistinct = 1024, kEnough = 24;
constexpr int kTried = 24;  // intervals from the last on, before all are sorted
// How many intervals may be looked at for each number that was added, to find the scales of groups
// that are not wholly on the grid. What groups leave, later ones may use.
constexpr std::int64_t kIntervalsPerNumber = 16;
// A group's largest number is one of so many codes at most: those of int8 from 64 to 128; and how
// many are tried at once, in whole vectors.
constexpr int kGuesses = 72;
// How much the floats of `Range` may be off, and more.
constexpr double kFloatSlack = 1e-6;
constexpr double kFar = 1e30;           // beyond all codes, and a float; so is its inverse below
constexpr double kSmall = 1. / 8;       // of the largest number
constexpr std::size_t kMost = 1 << 30;  // numbers that are counted

// A finite magnitude above zero, and the exact products that are rounded to it: those from `low` to
// `high`, times 2^exponent, with both ends or without.
struct Number {
  std::uint32_t bits, count;
  bool negative, open, coarse;
  int exponent;
  std::uint64_t low, high;
  double value;

  double lowest() const { return double(low) * power_of_two(exponent); }
  double highest() const { return double(high) * power_of_two(exponent); }
};

void read_number(const Wide& wide, Rounding rounding, std::uint32_t bits, Number& x) {
  const std::uint32_t magnitude = bits & ((1u << (wide.bits - 1)) - 1);
  const std::uint32_t field = magnitude >> (wide.precision - 1);
  const std::uint32_t first = 1u << (wide.precision - 1);
  const std::uint32_t significand = field ? (magnitude & (first - 1)) | first : magnitude;
  x.bits = magnitude;
  x.count = 1;
  x.negative = bits >> (wide.bits - 1);
  x.open = significand & 1;
  x.coarse = significand < 128;
  x.exponent = lowest(wide) + int(field ? field - 1 : 0) - kFine;
  x.value = double(significand) * power_of_two(x.exponent + kFine);
  // Halfway to the neighbours; the one below a power of two is half as far.
  const std::uint64_t middle = std::uint64_t(significand) << kFine, half = 1ull << (kFine - 1);
  x.low = middle - (significand == first && field > 1 ? half / 2 : half);
  x.high = middle + half;
  if (rounding == Rounding::through_fp32 && wide.precision < 24) {
    // A product near to a tie becomes the tie, and goes to the even neighbour.
    const auto reach = [&](std::uint64_t tie) {
      return 1ull << (std::max({1, bit_length(tie) - 24, -149 - x.exponent}) - 1);
    };
    const std::uint64_t below = reach(x.low), above = reach(x.high);
    x.low = x.open ? x.low + below : x.low - below;
    x.high = x.open ? x.high - above : x.high + above;
  }
}

struct Interval {
  std::int64_t first, last;  // none if first > last

  bool empty() const { return first > last; }
  Interval operator&(const Interval& other) const {
    return {std::max(first, other.first), std::min(last, other.last)};
  }
};
constexpr Interval kNone{1, 0};

// The significands in `within` of scales with this exponent under which magnitude `m` becomes x.
inline Interval significands(const Number& x, const Magnitude& m, int exponent,
                             const Interval& within) {
  int shift = m.power + exponent - x.exponent;
  if (shift < -12 || shift > 30) return kNone;
  const int up = shift < 0 ? -shift : 0;
  const std::uint64_t low = (x.low << up) + x.open, high = (x.high << up) - x.open;
  const std::uint64_t divisor = std::uint64_t(m.significand) << (shift + up);
  Interval found = within;
  if (divisor * std::uint64_t(within.first) < low)
    found.first = std::int64_t((low + divisor - 1) / divisor);
  if (divisor * std::uint64_t(within.last) > high) found.last = std::int64_t(high / divisor);
  return found;
}

// The number of an interval with the most zeros at its end.
std::uint32_t simplest(const Interval& interval) {
  const auto first = std::uint32_t(interval.first), last = std::uint32_t(interval.last);
  const int bit = bit_length((first - 1) ^ last) - 1;
  return last >> bit << bit;
}

// If the reference is one step, a number is from `low` to `high` steps, or a little less or more.
struct Range {
  float low, high;
};

inline std::int32_t bits_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(std::int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Of each guess of how many steps the reference is, counts the numbers that cannot be codes: one
// that is counted cannot, one that is not may. `steps` has the guesses, `misses` gets their counts;
// stops when all are above `allowed`, and says so. Floats above zero are in the order of their
// bits; with masks for branches, compilers make vector code of it.
__attribute__((always_inline)) inline bool count_misses(const Narrow& narrow, const Range* ranges,
                                                        const std::int32_t* counts, std::size_t n,
                                                        const float* steps, int guesses,
                                                        std::int32_t allowed,
                                                        std::int32_t* misses) {
  const Magnitude m = magnitude(narrow, std::uint32_t(narrow.largest + narrow.integer));
  const std::int32_t largest = bits_of(float(double(m.significand) * power_of_two(m.power)));
  const std::int32_t normal = bits_of(float(1 << narrow.mantissa));
  const std::int32_t kept = -(1 << (23 - narrow.mantissa));
  for (std::size_t i = 0; i < n; ++i) {
    const float low = ranges[i].low, high = ranges[i].high;
    const std::int32_t count = counts[i];
    std::int32_t fewest = INT32_MAX;
    for (int k = 0; k < guesses; ++k) {
      const std::int32_t from = bits_of(low * steps[k]), to = bits_of(high * steps[k]);
      // The largest code that is not above `to` has so many bits of its significand, or is an
      // integer where steps are no smaller.
      const std::int32_t small = -std::int32_t(to < normal);
      const auto integer = float(std::int32_t(float_of(to & small)));
      const std::int32_t code = (bits_of(integer) & small) | (to & kept & ~small);
      misses[k] += count & -(std::int32_t(code < from) | std::int32_t(from > largest));
      fewest = misses[k] < fewest ? misses[k] : fewest;
    }
    if (fewest > allowed) return false;
  }
  return true;
}

bool count_misses_plain(const Narrow& narrow, const Range* ranges, const std::int32_t* counts,
                        std::size_t n, const float* steps, int guesses, std::int32_t allowed,
                        std::int32_t* misses) {
  return count_misses(narrow, ranges, counts, n, steps, guesses, allowed, misses);
}
#ifdef KVZIP_X86
__attribute__((target("avx2"))) bool count_misses_avx2(const Narrow& narrow, const Range* ranges,
                                                       const std::int32_t* counts, std::size_t n,
                                                       const float* steps, int guesses,
                                                       std::int32_t allowed, std::int32_t* misses) {
  return count_misses(narrow, ranges, counts, n, steps, guesses, allowed, misses);
}
#endif

class Fitter {
 public:
  Fitter(const Wide& wide, const Narrow& narrow, Rounding rounding)
      : wide_(wide), narrow_(narrow), rounding_(rounding) {
#ifdef KVZIP_X86
    if (simd::vectors() != simd::Level::scalar) count_misses_ = count_misses_avx2;
#endif
  }

  // To begin a group of `size` numbers.
  void clear(std::size_t size) {
    numbers_.clear();
    total_ = 0;
    budget_ += kIntervalsPerNumber * std::int64_t(size);
    std::size_t slots = 64;
    while (slots < 4 * std::min(size, kDistinct)) slots *= 2;
    slots_.assign(slots, 0);
  }

  // Numbers beyond the first kDistinct different ones are not looked at: on a grid there are fewer.
  void add(std::uint32_t bits) {
    const std::uint32_t magnitude = bits & (top() - 1);
    if (!magnitude || magnitude >= infinity()) return;
    const std::uint32_t key = narrow_.integer ? bits : magnitude;
    std::size_t slot = (key * 0x9E3779B1u >> 8) & (slots_.size() - 1);
    for (; slots_[slot]; slot = (slot + 1) & (slots_.size() - 1)) {
      Number& known = numbers_[slots_[slot] - 1];
      if (known.bits == magnitude && (!narrow_.integer || known.negative == (bits != magnitude))) {
        ++known.count;
        ++total_;
        return;
      }
    }
    if (numbers_.size() == kDistinct) return;
    numbers_.emplace_back();
    read_number(wide_, rounding_, bits, numbers_.back());
    slots_[slot] = std::uint32_t(numbers_.size());
    ++total_;
  }

  // The scale, in the narrow format's steps, under which most of the numbers added are codes.
  Scale solve() {
    best_ = {0, kNeutral};
    best_.scale.exponent -= narrow_.step;
    const Number* reference = nullptr;
    // The largest may be off the grid: then the next says more.
    for (int attempt = 0; attempt < 3 && !is_enough(); ++attempt) {
      if (attempt && budget_ < 0) break;
      const std::uint32_t below = reference ? reference->bits : ~0u;
      reference = nullptr;
      for (const Number& x : numbers_)
        if (x.bits < below &&
            (!reference || x.bits > reference->bits || (x.bits == reference->bits && x.negative)))
          reference = &x;
      if (!reference) break;
      try_codes(*reference, attempt == 0);
    }
    return best_.scale;
  }

  std::uint8_t code(std::uint32_t bits, const Scale& scale, double inverse) const {
    const std::uint32_t size = bits & (top() - 1);
    const bool negative = bits & top();
    const auto sign = std::uint8_t(negative ? 1u << narrow_.sign : 0);
    const std::uint8_t signed_zero = narrow_.integer || narrow_.nan >= 0 ? 0 : sign;
    if (!size) return signed_zero;
    if (size >= infinity()) return special(size, sign);
    const std::uint32_t field = size >> (wide_.precision - 1), first = 1u << (wide_.precision - 1);
    const std::uint32_t significand = field ? (size & (first - 1)) | first : size;
    const double value =
        double(significand) * power_of_two(lowest(wide_) + int(field ? field - 1 : 0));
    int index = std::min(nearest(value * inverse), largest(negative));
    // A number is at most 1 / 256 from the product that it is rounded from: of fewer steps the
    // nearest is its code or it has none.
    if ((narrow_.integer && index >= 127) || !field)
      for (int other : {index, index - 1, index + 1})
        if (other >= 0 && other <= largest(negative) &&
            widen_magnitude(wide_, narrow_, rounding_, std::uint32_t(other), scale) == size) {
          index = other;
          break;
        }
    if (!index) return signed_zero;
    if (narrow_.integer)
      return std::uint8_t((negative ? -index : index) & ((2 << narrow_.sign) - 1));
    return std::uint8_t(index | sign);
  }

 private:
  struct Best {
    std::size_t explained;
    Scale scale;
  };
  // The significands under which so many numbers are codes. `none` of them are under smaller ones
  // than `first`: a number that may be one of two codes has two intervals.
  struct Explained {
    std::int32_t first, last;
    std::int64_t count, none;
  };
  struct Event {
    std::int64_t at, step;
  };
  // Scales of one exponent, and what a number is multiplied by to have it in steps: by a scale in
  // the middle, the largest and the smallest.
  struct Window {
    Interval scales;
    int exponent;
    double middle, smallest, largest;
  };

  std::uint32_t top() const { return 1u << (wide_.bits - 1); }
  std::uint32_t infinity() const { return top() - (1u << (wide_.precision - 1)); }
  int largest(bool negative) const { return narrow_.largest + (narrow_.integer && negative); }

  std::uint8_t special(std::uint32_t size, std::uint8_t sign) const {
    if (size == infinity()) return narrow_.infinity < 0 ? 0 : std::uint8_t(narrow_.infinity | sign);
    if (narrow_.nan >= 0) return std::uint8_t(narrow_.nan);
    const bool any = !narrow_.integer && narrow_.largest + 1 < 1 << narrow_.sign;
    return any ? std::uint8_t(((1 << narrow_.sign) - 1) | sign) : 0;
  }

  // The code whose magnitude is nearest, which may be beyond the largest.
  int nearest(double steps) const {
    const int mantissa = narrow_.mantissa;
    if (steps < double(1 << mantissa)) {
      const double above = steps + 0.5;
      return int(above);
    }
    std::uint64_t bits;
    std::memcpy(&bits, &steps, sizeof bits);
    bits += 1ull << (51 - mantissa);
    return int(bits >> (52 - mantissa)) - ((1022 + mantissa) << mantissa);
  }

  // Whatever the scale is, twice it may be it too, as long as codes are not too large: it is enough
  // that the reference is in the uppermost octave.
  void try_codes(const Number& reference, bool first) {
    const int top = largest(reference.negative);
    const int count = narrow_.integer ? top / 2 + 1 : 1 << narrow_.mantissa;
    // What makes numbers narrow often makes the largest the same code.
    if (first && usual_ <= top && usual_ > top - count) {
      for_windows(reference, usual_, [&](const Window& window) { narrow_down(window); });
      if (best_.explained == total_ && numbers_.size() >= kEnough) return;
    }
    if (!guess(reference, top, count)) return;
    // Most groups are wholly on a grid.
    for (int k = 0; first && k < count; ++k) {
      if (misses_[k]) continue;
      for_windows(reference, top - k, [&](const Window& window) { narrow_down(window); });
      // Nothing is simpler, or nothing else explains so much.
      if (best_.explained == total_ &&
          (best_.scale.significand == kOne || numbers_.size() >= kEnough)) {
        usual_ = top - k;
        return;
      }
    }
    if (best_.explained == total_) return;
    order_.clear();
    for (int k = 0; k < count; ++k)
      if (misses_[k] <= allowed()) order_.push_back(k);
    const auto fewer = [&](int a, int b) { return misses_[a] < misses_[b]; };
    std::stable_sort(order_.begin(), order_.end(), fewer);
    for (int k : order_) {
      if (total_ - std::size_t(misses_[k]) < best_.explained + is_enough()) return;
      for_windows(reference, top - k, [&](const Window& window) {
        // They are looked at, and may be sorted.
        if (budget_ > 0) budget_ -= (count_all(window) ? 1 : 3) * std::int64_t(numbers_.size());
      });
      if (budget_ < 0) return;
    }
  }

  // So many numbers may be off the grid if it is to be one.
  std::int32_t allowed() const { return std::int32_t(std::min(total_ / 8 + 1, kMost)); }

  // Counts the numbers that are no codes if the reference is code `top`, or `top` - 1 ... ; whether
  // any guess leaves enough.
  bool guess(const Number& reference, int top, int count) {
    const double smallest = 1 / reference.highest(), largest = 1 / reference.lowest();
    ranges_.resize(numbers_.size());
    counts_.resize(numbers_.size());
    // Small ones have the fewest codes near to them: they tell a wrong guess first.
    std::size_t front = 0, back = numbers_.size();
    for (const Number& x : numbers_) {
      const double low = x.lowest() * smallest * (1 - kFloatSlack);
      const double high = x.highest() * largest * (1 + kFloatSlack);
      const std::size_t at = high < kSmall ? front++ : --back;
      ranges_[at] = {float(std::clamp(low, 1 / kFar, kFar)), float(std::min(high, kFar))};
      counts_[at] = std::int32_t(std::min<std::size_t>(x.count, kMost / kDistinct));
    }
    const int guesses = (count + 7) / 8 * 8;
    for (int k = 0; k < guesses; ++k) {
      const Magnitude m = magnitude(narrow_, std::uint32_t(top - std::min(k, count - 1)));
      steps_[k] = float(double(m.significand) * power_of_two(m.power));
      misses_[k] = 0;
    }
    return count_misses_(narrow_, ranges_.data(), counts_.data(), numbers_.size(), steps_, guesses,
                         allowed(), misses_);
  }

  // Tries the scales, by exponents, under which a code becomes the reference.
  template <typename Try>
  void for_windows(const Number& reference, int index, Try&& attempt) {
    const Magnitude m = magnitude(narrow_, std::uint32_t(index));
    const double scale = reference.value / (double(m.significand) * power_of_two(m.power));
    const int near = std::ilogb(scale) - 23;
    for (int exponent = near - 1; exponent <= near + 1; ++exponent) {
      const int stored = exponent + narrow_.step + 23;
      if (stored < -126 || stored > 127) continue;
      const Interval scales = significands(reference, m, exponent, {kOne, kTwo - 1});
      if (scales.empty()) continue;
      const double least = double(scales.first) * power_of_two(exponent);
      const double most = double(scales.last) * power_of_two(exponent);
      attempt({scales, exponent, 2 / (least + most), 1 / most, 1 / least});
    }
  }

  // Whether no other scale would explain many more numbers.
  bool is_enough() const {
    if (numbers_.size() < kEnough) return best_.explained == total_;
    return total_ - best_.explained <= total_ / 16;
  }

  void offer(std::size_t explained, const Interval& interval, int exponent) {
    const std::uint32_t significand = simplest(interval);
    const auto zeros = [](std::uint32_t x) { return __builtin_ctz(x); };
    if (explained > best_.explained ||
        (explained == best_.explained && zeros(significand) > zeros(best_.scale.significand)))
      best_ = {explained, {significand, exponent}};
  }

  // What the codes near to x / scale allow, one interval each; they do not overlap.
  int intervals_of(const Number& x, const Window& window, Interval* found) const {
    const int top = largest(x.negative), middle = nearest(x.value * window.middle);
    const int reach = narrow_.integer || x.coarse;
    const double lowest = x.lowest() * window.smallest * (1 - kFloatSlack);
    const double highest = x.highest() * window.largest * (1 + kFloatSlack);
    int count = 0;
    // Larger codes want smaller scales.
    for (int index = std::min(middle + reach, top); index >= std::max(middle - reach, 1); --index) {
      // Integers are their own magnitudes, and most have no neighbour that comes near.
      if (narrow_.integer && (index < lowest || index > highest)) continue;
      const Magnitude m = magnitude(narrow_, std::uint32_t(index));
      const Interval one = significands(x, m, window.exponent, window.scales);
      if (one.empty()) continue;
      if (count && one.first <= found[count - 1].last)
        found[count - 1].last = std::max(found[count - 1].last, one.last);
      else found[count++] = one;
    }
    return count;
  }

  // Leaves of the window what each number leaves of it, if all are on the grid. A number that may
  // be one of two codes waits until the others have left less.
  void narrow_down(Window left) {
    Interval found[3];
    waiting_.clear();
    for (const Number& x : numbers_) {
      const int count = intervals_of(x, left, found);
      if (!count) return;
      if (count == 1) left.scales = found[0];
      else waiting_.push_back(&x);
    }
    for (std::size_t before = waiting_.size() + 1; !waiting_.empty() && waiting_.size() < before;) {
      before = waiting_.size();
      std::size_t kept = 0;
      for (const Number* x : waiting_) {
        const int count = intervals_of(*x, left, found);
        if (!count) return;
        if (count == 1) left.scales = found[0];
        else waiting_[kept++] = x;
      }
      waiting_.resize(kept);
    }
    if (waiting_.empty()) offer(total_, left.scales, left.exponent);
    else count_all(left);
  }

  // Offers the scales of the window that explain most numbers; whether that was seen at once.
  bool count_all(const Window& window) {
    intervals_.clear();
    Interval found[3];
    for (const Number& x : numbers_) {
      const int count = intervals_of(x, window, found);
      for (int i = 0; i < count; ++i)
        intervals_.push_back({std::int32_t(found[i].first), std::int32_t(found[i].last),
                              std::int64_t(x.count), i ? 0 : std::int64_t(x.count)});
    }
    if (count_from_last(window.exponent)) return true;
    count_sorted(window.exponent);
    return false;
  }

  // Where few numbers are off the grid, the scales that explain most begin where one of the last
  // intervals does: those that begin later explain nothing there. Returns whether that is sure.
  bool count_from_last(int exponent) {
    std::int64_t later = 0;
    std::int32_t next = std::int32_t(kTwo);
    for (int tried = 0; tried < kTried; ++tried) {
      if (std::int64_t(total_) - later < std::int64_t(best_.explained)) return true;
      std::int32_t first = 0;
      for (const Explained& x : intervals_) first = std::max(first, x.first < next ? x.first : 0);
      if (!first) return true;
      std::int32_t last = next - 1;
      std::int64_t explained = 0;
      for (const Explained& x : intervals_) {
        const bool here = x.first <= first && x.last >= first;
        explained += here ? x.count : 0;
        last = here ? std::min(last, x.last) : last;
        later += x.first == first ? x.none : 0;
      }
      if (std::size_t(explained) >= best_.explained)
        offer(std::size_t(explained), {first, last}, exponent);
      next = first;
    }
    return false;
  }

  // The same for any numbers: their intervals' ends are sorted.
  void count_sorted(int exponent) {
    events_.clear();
    for (const Explained& x : intervals_) {
      events_.push_back({x.first, x.count});
      events_.push_back({x.last + 1, -x.count});
    }
    std::sort(events_.begin(), events_.end(),
              [](const Event& a, const Event& b) { return a.at < b.at; });
    std::int64_t explained = 0;
    for (std::size_t i = 0; i < events_.size(); ++i) {
      explained += events_[i].step;
      if (i + 1 == events_.size() || events_[i + 1].at == events_[i].at) continue;
      if (explained > 0 && std::size_t(explained) >= best_.explained)
        offer(std::size_t(explained), {events_[i].at, events_[i + 1].at - 1}, exponent);
    }
  }

  const Wide& wide_;
  const Narrow& narrow_;
  Rounding rounding_;
  Best best_{};
  std::size_t total_ = 0;
  std::int64_t budget_ = 0;
  int usual_ = 0;  // the code of the largest number in a group before
  std::vector<Number> numbers_;
  std::vector<std::uint32_t> slots_;  // a hash table: a number's index and 1, or 0
  std::vector<const Number*> waiting_;
  std::vector<Explained> intervals_;
  std::vector<Event> events_;
  std::vector<Range> ranges_;
  std::vector<int> order_;
  std::vector<std::int32_t> counts_;
  float steps_[kGuesses];
  std::int32_t misses_[kGuesses];
  decltype(&count_misses_plain) count_misses_ = count_misses_plain;
};

}  // namespace

template <typename T>
void fit(const Wide& wide, const Narrow& narrow, Rounding rounding, const Shape& shape,
         const T* numbers, std::uint8_t* codes, std::uint32_t* scales) {
  Fitter fitter(wide, narrow, rounding);
  for (std::size_t row = 0; row < shape.rows; ++row)
    for (std::size_t t0 = 0; t0 < shape.tokens; t0 += shape.group_tokens)
      for (std::size_t c0 = 0; c0 < shape.channels; c0 += shape.group_channels) {
        const std::size_t t1 = t0 + std::min(shape.group_tokens, shape.tokens - t0);
        const std::size_t c1 = c0 + std::min(shape.group_channels, shape.channels - c0);
        const auto at = [&](std::size_t t, std::size_t c) {
          return (row * shape.tokens + t) * shape.channels + c;
        };
        fitter.clear((t1 - t0) * (c1 - c0));
        for (std::size_t t = t0; t < t1; ++t)
          for (std::size_t c = c0; c < c1; ++c) fitter.add(numbers[at(t, c)]);
        const Scale scale = fitter.solve();
        const double inverse = 1 / (double(scale.significand) * power_of_two(scale.exponent));
        for (std::size_t t = t0; t < t1; ++t)
          for (std::size_t c = c0; c < c1; ++c)
            codes[at(t, c)] = fitter.code(numbers[at(t, c)], scale, inverse);
        *scales++ = std::uint32_t(scale.exponent + narrow.step + 23 + 127) << 23 |
                    (scale.significand & (kOne - 1));
      }
}

template void fit(const Wide&, const Narrow&, Rounding, const Shape&, const std::uint16_t*,
                  std::uint8_t*, std::uint32_t*);
template void fit(const Wide&, const Narrow&, Rounding, const Shape&, const std::uint32_t*,
                  std::uint8_t*, std::uint32_t*);

}  // namespace kvzip::grid
