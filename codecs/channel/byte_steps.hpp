// What AVX2 and NEON share: a strip's values are bytes, looked up with byte shuffles and turned to
// rows as bytes. `Isa`, which derives from ByteSteps, has
//   Lanes     of ByteLanes, with `step` for one channel
//   Register  a vector of bytes
//   zip_low, zip_high  bytes of the lower or upper half (of each 16) of two, in turn
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
class ByteLanes : public StoredLanes {
 public:
  using StoredLanes::StoredLanes;

  template <typename T, int M>
  bool strip(StripWork<T, ValueBytes>& work) {
    if (lanes_ == kLanes) return strip<T, M, false>(work);
    std::uint32_t before[kLanes];
    store(before);
    const bool good = strip<T, M, true>(work);
    std::memcpy(x_ + lanes_, before + lanes_, 4 * (kLanes - lanes_));
    return good;
  }

 private:
  template <typename T, int M, bool limited>
  bool strip(StripWork<T, ValueBytes>& work) {
    auto& lanes = static_cast<Lanes&>(*this);
    const std::uint8_t* at = work.words->at;
    for (std::size_t c = 0; c < work.width; ++c) {
      work.template fetch<M>(c, at);
      if (!(work.live >> c & 1)) continue;
      at = work.words->ready(at);
      if (!at) return false;
      std::uint64_t escaped[kLanes / 64];
      if (__builtin_expect(lanes.template step<limited>(work.decoders[work.channels[c].shape], &at,
                                                        work.tile->of[c], escaped),
                           0))
        work.escaped[work.escaped_count++] = {c, {escaped[0], escaped[1]}};
    }
    work.words->at = at;
    return true;
  }
};

template <class Isa>
struct ByteSteps : ScalarSteps {
  template <typename T>
  using Decoded = ValueBytes;

  // Bytes of 16 vectors, which may be longer than 16, transposed 16 by 16 but for their order: four
  // perfect shuffles.
  template <class Register>
  static void transpose_bytes(Register rows[16]) {
    Register t[16];
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; ++stage) {
      const Register* const from = stage % 2 ? t : rows;
      Register* const to = stage % 2 ? rows : t;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        to[2 * i] = Isa::zip_low(from[i], from[i + 8]);
        to[2 * i + 1] = Isa::zip_high(from[i], from[i + 8]);
      }
    }
  }

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
      using Register = typename Isa::Register;
      Register values[16];
      Isa::turn(tile.of + c, token, values);
      const std::uint8_t* at = mantissas + c;
      for (std::size_t o = 0; o < count; o += 8, at += rows_of_octet(M) * kStrip) {
        Vector packed[R], fields[8];
        for (int j = 0; j < R; ++j) packed[j] = vector_at(at + (8 * B + j) * kStrip);
        unpack<R>(packed, fields);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i)
          Isa::template put<T, M>(values[o + i], Register(fields[i]), at + i * kStrip, base + c,
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
