// For any processor: vectors of four, of which the compiler makes what it can.
#include "predictive/vector_kernels.hpp"

namespace kvzip::predictive {
namespace {

typedef std::int32_t Numbers __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

struct Scalar : Divided<Floats>, OneByOne, LaneByLane<Numbers> {
  static constexpr int W = 4;
  using I = Numbers;
  typedef std::uint32_t U __attribute__((vector_size(16)));
  using F = Floats;

  static I abs(I v) { return (v ^ v >> 31) - (v >> 31); }
  static I least(I a, I b) { return a < b ? a : b; }
  static I most(I a, I b) { return a > b ? a : b; }
  static F less(F a, F b) { return a < b ? a : b; }
  static I low_halves(const std::uint64_t* x) {
    I v;
    for (int i = 0; i < W; ++i) v[i] = std::int32_t(x[i]);
    return v;
  }
  static std::uint64_t below(I a, I b) {
    std::uint64_t found = 0;
    for (int i = 0; i < W; ++i)
      found |= std::uint64_t(std::uint32_t(a[i]) < std::uint32_t(b[i])) << i;
    return found;
  }

  template <int S>
  static I product(I a, I b) {
    I v;
    for (int i = 0; i < W; ++i) v[i] = std::int32_t(std::int64_t(a[i]) * b[i] >> S);
    return v;
  }
  template <int S>
  static I scaled(I a, I b) {
    I v;
    for (int i = 0; i < W; ++i)
      v[i] = std::int32_t((std::int64_t(a[i]) * b[i] + (std::int64_t(1) << (S - 1))) >> S);
    return v;
  }
  // a*c + b*s, 2^14 being 1.
  static I turned(I a, I c, I b, I s) {
    I v;
    for (int i = 0; i < W; ++i)
      v[i] =
          std::int32_t((std::int64_t(a[i]) * c[i] + std::int64_t(b[i]) * s[i] + (1 << 13)) >> 14);
    return v;
  }
  static I z(I a, I m, std::int32_t limit) {
    I v;
    for (int i = 0; i < W; ++i)
      v[i] = std::int32_t(std::min<std::int64_t>(std::int64_t(a[i]) * m[i] >> 12, limit));
    return v;
  }

  struct Table : Paired {
    using Paired::Paired;
    void at(I i, I* a, I* b) const {
      for (int k = 0; k < W; ++k) {
        (*a)[k] = pair[2 * i[k]];
        (*b)[k] = pair[2 * i[k] + 1];
      }
    }
  };
  struct Search : Fours {
    using Fours::Fours;
    F at(I step, F x) const {
      F v;
      for (int k = 0; k < W; ++k) {
        const float* const of = four + 4 * (step[k] & (kSteps - 1));
        v[k] = ((of[3] * x[k] + of[2]) * x[k] + of[1]) * x[k] + of[0];
      }
      return v;
    }
  };
  static I at32(const std::int32_t* a, I at) {
    I v;
    for (int i = 0; i < W; ++i) v[i] = a[at[i]];
    return v;
  }

  static const std::uint8_t* advance(std::uint64_t* x, const std::int32_t* size,
                                     const std::int32_t* rest, const std::uint8_t* word) {
    return advance_each<W>(x, size, rest, word);
  }

  // sums + w . x, x still with its 128: `start` has what it comes to.
  static I dot(I sums, I x, const std::int8_t* w) {
    return sums + (x & 255) * w[0] + (x >> 8 & 255) * w[1] + (x >> 16 & 255) * w[2] +
           (x >> 24 & 255) * w[3];
  }
  static void products(const std::uint32_t* x, const std::int8_t* w, std::size_t groups,
                       std::size_t, const Order*, const std::int32_t* start, std::size_t n,
                       std::int32_t sums[4][kTile]) {
    for (std::size_t t = 0; t < n; t += W)
      for (int o = 0; o < 4; ++o) {
        I sum = I{} + start[o];
        for (std::size_t g = 0; g < groups; ++g) {
          I word;
          std::memcpy(&word, x + g * kTile + t, sizeof word);
          sum = dot(sum, word, w + g * 16 + o * 4);
        }
        std::memcpy(sums[o] + t, &sum, sizeof sum);
      }
  }
};

}  // namespace

const Kernels& scalar_kernels() {
  static constexpr Kernels k = VectorKernels<Scalar>::kernels({false, Scalar::products});
  return k;
}

}  // namespace kvzip::predictive
