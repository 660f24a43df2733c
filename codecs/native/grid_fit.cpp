// Which scales and codes make numbers: the search, of which spec.md has the reasons.
#include <cmath>
#include <cstring>
#include <vector>

#include "native/grid_round.hpp"

namespace kvzip::grid {
namespace {

constexpr std::uint32_t kOne = 1u << 23, kTwo = 1u << 24;  // bounds of a scale's significand
constexpr Scale kNeutral{kOne, -23};
// Bounds of a number's interval are counted in 2^-26 of its last place.
constexpr int kFine = 26;
constexpr std::size_t kDistinct = 1024, kEnough = 24, kFirst = 8;
// How many intervals may be looked at for each number that was added, to find the scales of groups
// that are not wholly on the grid. What groups leave, later ones may use.
constexpr std::int64_t kIntervalsPerNumber = 16;

inline double power_of_two(int exponent) {  // of a normal double
  const auto bits = std::uint64_t(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// A finite magnitude above zero, and the exact products that are rounded to it: those from `low` to
// `high`, times 2^exponent, with both ends or without.
struct Number {
  std::uint32_t bits, count;
  bool negative, open, coarse;
  int exponent;
  std::uint64_t low, high;
  double value;
};

Number read_number(const Wide& wide, Rounding rounding, std::uint32_t bits) {
  const std::uint32_t magnitude = bits & ((1u << (wide.bits - 1)) - 1);
  const std::uint32_t field = magnitude >> (wide.precision - 1);
  const std::uint32_t first = 1u << (wide.precision - 1);
  const std::uint32_t significand = field ? (magnitude & (first - 1)) | first : magnitude;
  Number x;
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
      return 1ull << (std::max(bit_length(tie) - 24, -149 - x.exponent) - 1);
    };
    const std::uint64_t below = reach(x.low), above = reach(x.high);
    x.low = x.open ? x.low + below : x.low - below;
    x.high = x.open ? x.high - above : x.high + above;
  }
  return x;
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

class Fitter {
 public:
  Fitter(const Wide& wide, const Narrow& narrow, Rounding rounding)
      : wide_(wide), narrow_(narrow), rounding_(rounding) {}

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
    numbers_.push_back(read_number(wide_, rounding_, bits));
    slots_[slot] = std::uint32_t(numbers_.size());
    ++total_;
  }

  // The scale, in the narrow format's steps, under which most of the numbers added are codes.
  Scale solve() {
    best_ = {0, kNeutral};
    best_.scale.exponent -= narrow_.step;
    // The smallest have the fewest codes near to them: they tell a wrong guess first.
    const auto smaller = [](const Number& a, const Number& b) { return a.bits < b.bits; };
    if (numbers_.size() > kFirst)
      std::nth_element(numbers_.begin(), numbers_.begin() + kFirst, numbers_.end(), smaller);
    // Most groups are wholly on a grid or on none, which is soon seen.
    for (std::size_t allowed : {std::size_t(0), total_ / 8 + 1}) {
      std::uint32_t below = ~0u;
      if (allowed && best_.explained < total_) {
        std::sort(numbers_.begin(), numbers_.end(), smaller);
      }
      // The largest may be off the grid: then the next says more.
      for (int attempt = 0; attempt < (allowed ? 3 : 1) && !is_enough(allowed); ++attempt) {
        if (allowed && budget_ < 0) break;

        const Number* reference = nullptr;
        for (const Number& x : numbers_)
          if (x.bits < below &&
              (!reference || x.bits > reference->bits || (x.bits == reference->bits && x.negative)))
            reference = &x;
        if (!reference) break;
        below = reference->bits;
        try_codes(*reference, allowed);
      }
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
    if (narrow_.integer || !field)
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
  struct Event {
    std::int64_t at, step;
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
    if (steps < double(1 << mantissa)) return int(std::lround(steps));
    std::uint64_t bits;
    std::memcpy(&bits, &steps, sizeof bits);
    bits += 1ull << (51 - mantissa);
    return int(bits >> (52 - mantissa)) - ((1022 + mantissa) << mantissa);
  }

  // Whatever the scale is, twice it may be it too, as long as codes are not too large: it is enough
  // that the reference is in the uppermost octave.
  void try_codes(const Number& reference, std::size_t allowed) {
    const int top = largest(reference.negative);
    const int count = narrow_.integer ? top / 2 + 1 : 1 << narrow_.mantissa;
    for (int index = top; index > top - count; --index) {
      const Magnitude m = magnitude(narrow_, std::uint32_t(index));
      const double scale = reference.value / (double(m.significand) * power_of_two(m.power));
      const int near = std::ilogb(scale) - 23;
      for (int exponent = near - 1; exponent <= near + 1; ++exponent) {
        const int stored = exponent + narrow_.step + 23;
        if (stored < -126 || stored > 127) continue;
        const Interval window = significands(reference, m, exponent, {kOne, kTwo - 1});
        if (window.empty()) continue;
        try_window(window, exponent, allowed);
        // Nothing is simpler, or nothing else explains so much.
        if (best_.explained == total_ &&
            (best_.scale.significand == kOne || numbers_.size() >= kEnough))
          return;
        if (allowed && (budget_ < 0 || is_enough(allowed))) return;
      }
    }
  }

  // Whether no other scale would explain many more numbers.
  bool is_enough(std::size_t allowed) const {
    if (!allowed || numbers_.size() < kEnough) return best_.explained == total_;
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
  int intervals_of(const Number& x, const Interval& window, int exponent, double inverse,
                   Interval* found) const {
    const int top = largest(x.negative), middle = nearest(x.value * inverse);
    const int reach = narrow_.integer || x.coarse;
    int count = 0;
    // Larger codes want smaller scales.
    for (int index = std::min(middle + reach, top); index >= std::max(middle - reach, 1); --index) {
      const Interval one =
          significands(x, magnitude(narrow_, std::uint32_t(index)), exponent, window);
      if (one.empty()) continue;
      if (count && one.first <= found[count - 1].last)
        found[count - 1].last = std::max(found[count - 1].last, one.last);
      else found[count++] = one;
    }
    return count;
  }

  void try_window(const Interval& window, int exponent, std::size_t allowed) {
    const double inverse = 2 / (double(window.first + window.last) * power_of_two(exponent));
    if (!allowed) {
      narrow_down(window, exponent, inverse);
      return;
    }
    Interval found[3];
    std::size_t misses = 0;
    for (const Number& x : numbers_) {
      --budget_;
      if (!intervals_of(x, window, exponent, inverse, found)) {
        misses += x.count;
        if (misses > allowed || total_ - misses < best_.explained) return;
      }
    }
    budget_ -= 4 * std::int64_t(numbers_.size());  // they are looked at again, and sorted
    count_all(window, exponent, inverse);
  }

  // Leaves of the window what each number leaves of it, if all are on the grid. A number that may
  // be one of two codes waits until the others have left less.
  void narrow_down(Interval left, int exponent, double inverse) {
    Interval found[3];
    waiting_.clear();
    for (const Number& x : numbers_) {
      const int count = intervals_of(x, left, exponent, inverse, found);
      if (!count) return;
      if (count == 1) left = found[0];
      else waiting_.push_back(&x);
    }
    for (std::size_t before = waiting_.size() + 1; !waiting_.empty() && waiting_.size() < before;) {
      before = waiting_.size();
      std::size_t kept = 0;
      for (const Number* x : waiting_) {
        const int count = intervals_of(*x, left, exponent, inverse, found);
        if (!count) return;
        if (count == 1) left = found[0];
        else waiting_[kept++] = x;
      }
      waiting_.resize(kept);
    }
    if (waiting_.empty()) offer(total_, left, exponent);
    else count_all(left, exponent, inverse);
  }

  // Counts how many numbers each scale of the window explains.
  void count_all(const Interval& window, int exponent, double inverse) {
    events_.clear();
    Interval found[3];
    for (const Number& x : numbers_) {
      const int count = intervals_of(x, window, exponent, inverse, found);
      for (int i = 0; i < count; ++i) {
        events_.push_back({found[i].first, x.count});
        events_.push_back({found[i].last + 1, -std::int64_t(x.count)});
      }
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
  Best best_;
  std::size_t total_ = 0;
  std::int64_t budget_ = 0;
  std::vector<Number> numbers_;
  std::vector<std::uint32_t> slots_;  // a hash table: a number's index and 1, or 0
  std::vector<const Number*> waiting_;
  std::vector<Event> events_;
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

namespace {

constexpr int kPieces = 5, kPiece = 16, kLongPiece = 32;

// Neighbours along the channels or the tokens of an array. The `number`th of the pieces is in the
// `number`th part of the channels, since not all may be on a grid, and of another part of the
// tokens.
template <typename T>
int take_piece(const T* numbers, int dimensions, const std::size_t* shape,
               const std::int64_t* strides, bool tokens, int number, std::uint32_t* piece) {
  const int along = tokens ? dimensions - 2 : dimensions - 1;
  const std::size_t count = std::min<std::size_t>(kLongPiece, shape[along]);
  std::int64_t at = 0;
  for (int i = 0; i < dimensions; ++i) {
    const auto place = std::size_t(i == dimensions - 1 ? number : (2 * number + 1) % kPieces);
    std::size_t index = (2 * place + 1) * shape[i] / (2 * kPieces);
    if (i == along) index = std::min(index / kLongPiece * kLongPiece, shape[i] - count);
    at += std::int64_t(index) * strides[i];
  }
  for (std::size_t i = 0; i < count; ++i) piece[i] = numbers[at + std::int64_t(i) * strides[along]];
  return int(count);
}

// No more different significands than four bits can make.
bool few(const Wide& wide, const std::uint32_t* piece, int n) {
  std::uint32_t seen[kPiece];
  int count = 0;
  n = std::min(n, kPiece);
  for (int i = 0; i < n; ++i) {
    const std::uint32_t magnitude = piece[i] & ((1u << (wide.bits - 1)) - 1);
    const std::uint32_t fraction = magnitude & ((1u << (wide.precision - 1)) - 1);
    // The subnormal numbers have rounded away what would tell.
    if (magnitude == fraction) continue;
    bool known = false;
    for (int k = 0; k < count; ++k) known |= seen[k] == fraction;
    if (!known) seen[count++] = fraction;
  }
  return count <= n / 2 + 1;
}

// Nearly all are multiples of one step, if the largest is one of 64 ... 128 steps.
bool even(const Wide& wide, const std::uint32_t* piece, int n) {
  float values[kLongPiece], slack[kLongPiece], largest = 0, slack_of_largest = 0;
  for (int i = 0; i < n; ++i) {
    const std::uint32_t magnitude = piece[i] & ((1u << (wide.bits - 1)) - 1);
    const std::uint32_t field = magnitude >> (wide.precision - 1);
    const std::uint32_t first = 1u << (wide.precision - 1);
    const std::uint32_t significand = field ? (magnitude & (first - 1)) | first : magnitude;
    if (field >= 2u * unsigned(wide.bias) + 1) return false;
    values[i] =
        float(double(significand) * power_of_two(lowest(wide) + int(field ? field - 1 : 0)));
    slack[i] = significand ? 0.5f / float(significand) + 1e-6f : 0;
    if (values[i] > largest) {
      largest = values[i];
      slack_of_largest = slack[i];
    }
  }
  if (largest == 0) return true;
  // 64 ... 128, and three more for whole vectors.
  constexpr int kCodes = 68;
  std::int32_t misses[kCodes] = {};
  const float unit = 1 / largest;
  for (int i = 0; i < n; ++i) {
    const float value = values[i] * unit, tolerance = value * (slack[i] + slack_of_largest);
    for (int code = 0; code < kCodes; ++code) {
      const float steps = value * float(64 + code);
      // Not lround, which is no vector instruction; halves are far off the grid either way.
      // NOLINTNEXTLINE(bugprone-incorrect-roundings)
      const float off = steps - float(std::int32_t(steps + 0.5f));
      misses[code] += (off < 0 ? -off : off) > tolerance * float(64 + code);
    }
    // One in ten may be off the grid, of those until here as of all.
    if (i % 4 == 3 && *std::min_element(misses, misses + kCodes) > 1 + i / 10) return false;
  }
  return true;
}

}  // namespace

template <typename T>
unsigned suspicions(const Wide& wide, const T* numbers, int dimensions, const std::size_t* shape,
                    const std::int64_t* strides) {
  // Half of the channels may be beside a grid of codes and scales; and of five pieces that are in
  // equal parts of the channels, three may be in that half. Halves are all channels or none.
  constexpr int kTooMany = kPieces - 1, kTooManyForHalf = kPieces / 2 + 1;
  std::uint32_t piece[kLongPiece];
  int against[5] = {};
  for (int tokens = 0; tokens < 2; ++tokens) {
    int &not_few = against[tokens], &not_even = against[2 + tokens], &not_half = against[4];
    if (shape[dimensions - 1 - tokens] < std::size_t(kPiece)) {
      not_few = not_even = kTooMany;
      continue;
    }
    // A few of the pieces are enough for most arrays.
    for (int i = 0; i < kPieces; ++i) {
      if (not_few >= kTooMany && not_even >= kTooMany &&
          (wide.bits == 16 || not_half >= kTooManyForHalf))
        break;
      const int n = take_piece(numbers, dimensions, shape, strides, tokens, i, piece);
      if (not_few < kTooMany) not_few += !few(wide, piece, n);
      if (not_even < kTooMany) not_even += !even(wide, piece, n);
      int used = 0;
      for (int k = 0; k < n; ++k) used += (piece[k] & 0x1FFF) != 0;
      not_half += used > n / 8;
    }
  }
  if (wide.bits == 16) against[4] = kTooManyForHalf;
  unsigned found = 0;
  for (int i = 0; i < 5; ++i)
    found |= against[i] < (i < 4 ? kTooMany : kTooManyForHalf) ? 1u << i : 0;
  return found;
}

template unsigned suspicions(const Wide&, const std::uint16_t*, int, const std::size_t*,
                             const std::int64_t*);
template unsigned suspicions(const Wide&, const std::uint32_t*, int, const std::size_t*,
                             const std::int64_t*);

}  // namespace kvzip::grid
