// Which grids a few of an array's numbers look like; spec.md has the reasons.
#include <cstring>

#include "native/grid_round.hpp"

namespace kvzip::grid {
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
