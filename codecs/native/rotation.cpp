#include "native/rotation.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "native/rotation_kernels.hpp"
#include "native/simd.hpp"

namespace kvzip {
namespace rotation {
constexpr Kernels baseline = kernels_of<4>();
}

namespace {

const rotation::Kernels& kernels() {
#ifdef KVZIP_X86
  if (simd::vectors() == simd::Level::avx512) return rotation::avx512;
  if (simd::vectors() == simd::Level::avx2) return rotation::avx2;
#endif
  return rotation::baseline;
}

// Bytes of angles that are kept, at most: those of 262,144 positions of 64 pairs.
constexpr std::size_t kKept = std::size_t(128) << 20;

std::uint16_t bf16(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return std::uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

// Cosine and sine by Taylor's series around the nearest quarter of a turn: with 8 terms off by less
// than 2^-50, which shows in bf16 where a value is that near to the middle between two numbers.
void cos_sin(double angle, double* cos, double* sin) {
  // Pi / 2 in three parts, of which products with a number of quarters below 2^20 are exact.
  constexpr double kQuarter[3] = {0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2e037073p-69};
  const double quarters = std::floor(angle * 0x1.45f306dc9c883p-1 + 0.5);
  double r = angle;
  for (const double part : kQuarter) r -= quarters * part;
  const double r2 = r * r;
  double c = 1, s = 1;
  for (int n = 8; n > 0; --n) {
    c = 1 - c * r2 * (1.0 / ((2 * n - 1) * (2 * n)));
    s = 1 - s * r2 * (1.0 / ((2 * n) * (2 * n + 1)));
  }
  s *= r;
  const auto quarter = std::int64_t(quarters) & 3;
  const double x = quarter & 1 ? s : c, y = quarter & 1 ? c : s;
  *cos = quarter == 1 || quarter == 2 ? -x : x;
  *sin = quarter >= 2 ? -y : y;
}

float from_bf16(std::uint16_t number) {
  const std::uint32_t u = std::uint32_t(number) << 16;
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// The cosine and the sine of a pair at a position.
void angle_of(float position, float frequency, float scale, bool wide, float* cosine, float* sine) {
  const double angle = double(position * frequency);
  double cos = 1, sin = 0;
  if (std::fabs(angle) < 0x1p40) cos_sin(angle, &cos, &sin);  // a header may say anything
  const auto scaled = [&](double value) {
    const float v = float(value) * scale;
    // So that no product of a key with it is so small that processors differ.
    if (std::fabs(v) < 0x1p-40f) return 0.0f;
    return wide ? v : from_bf16(bf16(v));
  };
  *cosine = scaled(cos);
  *sine = scaled(sin);
}

}  // namespace

Rotation::Rotation(const float* frequency, std::size_t pairs, float scale)
    : frequency_(frequency, frequency + pairs), scale_(scale) {}

Rotation::Places Rotation::places_of(std::size_t pair, RopeRounding rounding) const {
  if (is_side_by_side(rounding)) return {2 * pair, 2 * pair + 1};
  return {pair, pair + pairs()};
}

Rotation::Angles Rotation::angles_at(std::size_t block, RopeRounding rounding) const {
  const bool wide = is_wide(rounding), side_by_side = is_side_by_side(rounding);
  const std::lock_guard<std::mutex> lock(mutex_);
  Angles& known = known_[4 * block + 2 * side_by_side + wide];
  if (!known) {
    const std::size_t padded = rotation::grouped(pairs());
    auto made = std::make_shared<std::vector<float>>(kPositions * 2 * padded);
    for (std::size_t t = 0; t < kPositions; ++t) {
      float* const out = made->data() + t * 2 * padded;
      for (std::size_t i = 0; i < pairs(); ++i) {
        float* const cosine = out + rotation::place_of(i, side_by_side);
        angle_of(float(block * kPositions + t), frequency_[i], scale_, wide, cosine,
                 cosine + padded);
      }
    }
    known = std::move(made);
  }
  const Angles found = known;
  if (known_.size() * found->size() * sizeof(float) > kKept) known_.clear();
  return found;
}

template <typename Use>
void Rotation::each_run(std::size_t first, std::size_t tokens, RopeRounding rounding,
                        const Use& use) const {
  for (std::size_t t = 0; t < tokens;) {
    const std::size_t at = (first + t) % kPositions, n = std::min(kPositions - at, tokens - t);
    const Angles angles = angles_at((first + t) / kPositions, rounding);
    use(angles->data() + at * 2 * rotation::grouped(pairs()), t, n);
    t += n;
  }
}

template <typename T>
void Rotation::write_angles(std::size_t first, std::size_t positions, T* out) const {
  constexpr bool kWide = std::is_same<T, float>::value;
  const std::size_t padded = rotation::grouped(pairs());
  each_run(first, positions, kWide ? RopeRounding::wide : RopeRounding::each,
           [&](const float* angles, std::size_t, std::size_t n) {
             for (std::size_t k = 0; k < 2 * n; ++k, angles += padded)
               for (std::size_t i = 0; i < pairs(); ++i) {
                 const float v = angles[rotation::place_of(i, false)];
                 if constexpr (kWide) *out++ = v;
                 else *out++ = bf16(v);
               }
           });
}

void Rotation::angles_of(std::size_t first, std::size_t positions, float* out) const {
  write_angles(first, positions, out);
}
void Rotation::angles_of(std::size_t first, std::size_t positions, std::uint16_t* out) const {
  write_angles(first, positions, out);
}

void Rotation::turn(const Rows<std::uint16_t>& keys, std::size_t first,
                    RopeRounding rounding) const {
  const rotation::Turn kernel =
      kernels().turn[is_side_by_side(rounding)][!rounds_products(rounding)];
  each_run(first, keys.tokens, rounding, [&](const float* angles, std::size_t t, std::size_t n) {
    for (std::size_t h = 0; h < keys.heads; ++h)
      kernel(
          {keys.data + std::ptrdiff_t(h) * keys.head_stride + std::ptrdiff_t(t) * keys.token_stride,
           keys.token_stride, angles, n, pairs()});
  });
}

bool Rotation::unturn(const Rows<const std::uint16_t>& keys, std::size_t first,
                      RopeRounding rounding, const Rows<std::uint16_t>& out, std::size_t most,
                      std::vector<std::uint64_t>* missing) const {
  const rotation::Unturn kernel =
      kernels().unturn[is_side_by_side(rounding)][!rounds_products(rounding)];
  std::vector<std::uint64_t> room(std::min(kPositions, keys.tokens) * pairs());
  bool few = true;
  each_run(first, keys.tokens, rounding, [&](const float* angles, std::size_t t, std::size_t n) {
    for (std::size_t h = 0; few && h < keys.heads; ++h) {
      const std::size_t count = kernel(
          {keys.data + std::ptrdiff_t(h) * keys.head_stride + std::ptrdiff_t(t) * keys.token_stride,
           keys.token_stride,
           out.data + std::ptrdiff_t(h) * out.head_stride + std::ptrdiff_t(t) * out.token_stride,
           out.token_stride, angles, n, pairs(), most - missing->size(), room.data()});
      for (std::size_t i = 0; i < count; ++i)
        missing->push_back((h * keys.tokens + t) * pairs() + room[i]);
      few = missing->size() <= most;
    }
  });
  std::sort(missing->begin(), missing->end());
  return few;
}

}  // namespace kvzip
