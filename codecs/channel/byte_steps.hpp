// What AVX2 and NEON share: a strip's values are bytes, looked up with byte shuffles and turned to
// rows as bytes. `Simd`, which derives from ByteValues, has
//   Lanes     of ByteLanes, with `step` for one channel
//   Register  a vector of bytes
//   turn      channels of 16 tokens, as many as a vector has bytes, as rows
//   put       such a row's numbers, from values, mantissas and bases
#pragma once

#include "channel/scalar_steps.hpp"

namespace kvzip::channel {
namespace {

// Sign and seven bits of exponent, a byte each.
struct ValueBytes {
  static constexpr bool kWhole = false;
  alignas(64) std::uint8_t of[kStrip][kLanes];
};

template <class Lanes>
class ByteLanes {
 public:
  explicit ByteLanes(const std::uint32_t* states) { std::memcpy(x_, states, sizeof x_); }

  void store(std::uint32_t* states) const { std::memcpy(states, x_, sizeof x_); }
  void limit(std::size_t lanes) { lanes_ = lanes; }

  template <typename T, int M>
  bool strip(Steps<T, ValueBytes>& steps) {
    if (lanes_ == kLanes) return strip<T, M, false>(steps);
    std::uint32_t before[kLanes];
    store(before);
    const bool good = strip<T, M, true>(steps);
    std::memcpy(x_ + lanes_, before + lanes_, 4 * (kLanes - lanes_));
    return good;
  }

 protected:
  alignas(64) std::uint32_t x_[kLanes];
  std::size_t lanes_ = kLanes;

 private:
  template <typename T, int M, bool limited>
  bool strip(Steps<T, ValueBytes>& steps) {
    auto& lanes = static_cast<Lanes&>(*this);
    const std::uint8_t* at = steps.words->at;
    for (std::size_t c = 0; c < steps.width; ++c) {
      steps.template fetch<M>(c, at);
      if (!(steps.live >> c & 1)) continue;
      at = steps.words->ready(at);
      if (!at) return false;
      std::uint64_t escaped[kLanes / 64];
      if (__builtin_expect(lanes.template step<limited>(steps.decoders[steps.channels[c].shape],
                                                        &at, steps.tile->of[c], escaped),
                           0))
        steps.escaped[steps.escaped_count++] = {c, {escaped[0], escaped[1]}};
    }
    steps.words->at = at;
    return true;
  }
};

template <class Simd>
struct ByteValues : Scalar {
  template <typename T>
  using Decoded = ValueBytes;

  template <typename T, int M>
  static void merge(const ValueBytes& tile, std::size_t token, std::size_t count, const T* base,
                    const std::uint8_t* mantissas, T* corner, std::ptrdiff_t stride,
                    std::size_t width) {
    constexpr int R = M % 8, B = M / 8;
    alignas(kVector) T rows[16][kStrip];
    const bool whole = width == kStrip && count == 16;
    T* const out = whole ? corner : rows[0];
    const std::ptrdiff_t step = whole ? stride : kStrip;
    for (std::size_t c = 0; c < kStrip; c += kVector) {
      using Register = typename Simd::Register;
      Register values[16];
      Simd::turn(tile.of + c, token, values);
      const std::uint8_t* at = mantissas + c;
      for (std::size_t o = 0; o < count; o += 8, at += rows_of_octet(M) * kStrip) {
        Vector packed[R], fields[8];
        for (int j = 0; j < R; ++j) packed[j] = vector_at(at + (8 * B + j) * kStrip);
        unpack<R>(packed, fields);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i)
          Simd::template put<T, M>(values[o + i], Register(fields[i]), at + i * kStrip, base + c,
                                   out + std::ptrdiff_t(o + i) * step + c);
      }
    }
    if (!whole)
      for (std::size_t i = 0; i < count; ++i)
        std::memcpy(corner + std::ptrdiff_t(i) * stride, rows[i], width * sizeof(T));
  }
};

}  // namespace
}  // namespace kvzip::channel
