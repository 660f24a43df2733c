// Which grids a few of an array's numbers look like; spec.md has the reasons.
#include <cmath>
#include <cstring>
#include <limits>

#include "native/grid_round.hpp"
#include "native/simd.hpp"

namespace kvzip::grid {
namespace {

constexpr int kPieces = 5, kPiece = 16, kLongPiece = 32;
constexpr std::size_t kMostGroups = 16;

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
    if (known) continue;
    if (count > n / 2) return false;
    seen[count++] = fraction;
  }
  return true;
}

constexpr int kOneInTen = -1;
// 64 ... 128, and three more for whole vectors.
constexpr int kCodes = 68;

// Numbers in shares of the largest, and how far each may be off, in the same.
struct Shares {
  float value[kLongPiece], tolerance[kLongPiece];
};

// Whether nearly all are multiples of one step, of which the largest is one of 64 ... 128.
// `off`: how many may be off the grid, or kOneInTen, of the first ones as of all.
__attribute__((always_inline)) inline bool has_step_any(const Shares& x, int n, int off) {
  std::int32_t misses[kCodes] = {};
  for (int i = 0; i < n; ++i) {
    const float value = x.value[i], tolerance = x.tolerance[i];
    std::int32_t fewest = INT32_MAX;
    for (int code = 0; code < kCodes; ++code) {
      const float steps = value * float(64 + code);
      // Not lround, which is no vector instruction; halves are far off the grid either way.
      // NOLINTNEXTLINE(bugprone-incorrect-roundings)
      const float off = steps - float(std::int32_t(steps + 0.5f));
      misses[code] += (off < 0 ? -off : off) > tolerance * float(64 + code);
      fewest = misses[code] < fewest ? misses[code] : fewest;
    }
    if (off == kOneInTen ? i % 4 == 3 && fewest > 1 + i / 10 : fewest > off) return false;
  }
  return true;
}

#ifdef KVZIP_X86
__attribute__((target("avx2"))) bool has_step_avx2(const Shares& x, int n, int off) {
  return has_step_any(x, n, off);
}
#endif

bool has_step(const Shares& x, int n, int off) {
#ifdef KVZIP_X86
  if (simd::vectors() != simd::Level::scalar) return has_step_avx2(x, n, off);
#endif
  return has_step_any(x, n, off);
}

// A magnitude, and how far the product that was rounded to it may be off, as a share of it; whether
// it is finite.
bool read(const Wide& wide, std::uint32_t bits, float& value, float& slack) {
  const std::uint32_t magnitude = bits & ((1u << (wide.bits - 1)) - 1);
  const std::uint32_t field = magnitude >> (wide.precision - 1);
  const std::uint32_t first = 1u << (wide.precision - 1);
  const std::uint32_t significand = field ? (magnitude & (first - 1)) | first : magnitude;
  if (field >= 2u * unsigned(wide.bias) + 1) return false;
  value = float(double(significand) * power_of_two(lowest(wide) + int(field ? field - 1 : 0)));
  slack = significand ? 0.5f / float(significand) + 1e-6f : 0;
  return true;
}

bool even(const Wide& wide, const std::uint32_t* piece, int n) {
  Shares x;
  float slack[kLongPiece], largest = 0, slack_of_largest = 0;
  for (int i = 0; i < n; ++i) {
    if (!read(wide, piece[i], x.value[i], slack[i])) return false;
    if (x.value[i] > largest) {
      largest = x.value[i];
      slack_of_largest = slack[i];
    }
  }
  if (largest == 0) return true;
  const float unit = 1 / largest;
  for (int i = 0; i < n; ++i) {
    x.value[i] *= unit;
    x.tolerance[i] = x.value[i] * (slack[i] + slack_of_largest);
  }
  return has_step(x, n, kOneInTen);
}

// Whether all of a group's numbers but `off` could be codes of int8 times a scale. The largest that
// is one is tried as each of the codes from 64 on. What the search finds, this allows: its
// tolerance is that of two roundings in full, (1 + a) / (1 - b).
bool could_be_even(const Wide& wide, const std::uint32_t* group, int n, int off) {
  Shares x;
  float value[kPiece], slack[kPiece];
  int finite = 0;
  for (int i = 0; i < n; ++i) finite += read(wide, group[i], value[finite], slack[finite]);
  off -= n - finite;
  float below = INFINITY;
  for (int reference = 0; reference <= off; ++reference) {
    int at = -1;
    for (int i = 0; i < finite; ++i)
      if (value[i] < below && (at < 0 || value[i] > value[at])) at = i;
    if (at < 0 || value[at] < std::numeric_limits<float>::min()) return true;
    below = value[at];
    const float unit = 1 / below, most = 1 / (1 - slack[at]);
    for (int i = 0; i < finite; ++i) {
      const bool larger = value[i] > below;  // then it is off the grid
      x.value[i] = larger ? 0 : value[i] * unit;
      x.tolerance[i] = larger ? -1 : x.value[i] * (slack[i] + slack[at]) * most;
    }
    if (has_step(x, finite, off)) return true;
  }
  return false;
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

template <typename T>
bool may_have_even_channels(const Wide& wide, const T* numbers, int dimensions,
                            const std::size_t* shape, const std::int64_t* strides) {
  const std::size_t tokens = shape[dimensions - 2], channels = shape[dimensions - 1];
  const std::size_t size = std::min<std::size_t>(kPiece, tokens);
  const std::size_t blocks = (tokens - 1) / size + 1;
  // Of many groups to a channel some look even by chance: that tells nothing.
  std::size_t rows = 1;
  for (int i = 0; i < dimensions - 2; ++i) {
    rows *= shape[i];
    if (rows * blocks > kMostGroups) return true;
  }
  const auto off = int(size) - int(std::ceil(kOfGroup * double(size)));
  const auto even = [&](std::size_t channel) {
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t block = 0; block < blocks; ++block) {
        std::int64_t at = std::int64_t(channel) * strides[dimensions - 1];
        std::size_t rest = row;
        for (int i = dimensions - 2; i--; rest /= shape[i])
          at += std::int64_t(rest % shape[i]) * strides[i];
        std::uint32_t group[kPiece];
        for (std::size_t i = 0; i < size; ++i)
          group[i] = numbers[at + std::int64_t(std::min(block * size + i, tokens - 1)) *
                                      strides[dimensions - 2]];
        if (could_be_even(wide, group, int(size), off)) return true;
      }
    return false;
  };
  // Half of the channels, side by side, have one of the middle among them.
  std::size_t first = channels / 2, last = first;
  const std::size_t enough = channels - channels / 2;
  while (last < channels && last - first < enough && even(last)) ++last;
  while (first > 0 && last - first < enough && even(first - 1)) --first;
  return last - first >= enough;
}

template bool may_have_even_channels(const Wide&, const std::uint16_t*, int, const std::size_t*,
                                     const std::int64_t*);
template bool may_have_even_channels(const Wide&, const std::uint32_t*, int, const std::size_t*,
                                     const std::int64_t*);
template unsigned suspicions(const Wide&, const std::uint16_t*, int, const std::size_t*,
                             const std::int64_t*);
template unsigned suspicions(const Wide&, const std::uint32_t*, int, const std::size_t*,
                             const std::int64_t*);

}  // namespace kvzip::grid
