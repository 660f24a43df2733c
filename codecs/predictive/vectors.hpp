// Vectors of W numbers of 32 bits, and what every instruction set can do with them. `Isa` (of
// kernels_*.cpp) has the vectors I (signed), U (unsigned) and F (float), and the few operations
// that differ between instruction sets. Signed numbers wrap (-fwrapv).
#pragma once

#include <cstring>

#include "predictive/kernels.hpp"

namespace kvzip::predictive {
namespace {

template <class Isa>
struct Vectors {
  using I = typename Isa::I;
  using U = typename Isa::U;
  using F = typename Isa::F;
  static constexpr int W = Isa::W;
  static_assert(kStream % W == 0 && kTile % kStream == 0);

  static I load(const void* p) {
    I v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, I v) { std::memcpy(p, &v, sizeof v); }
  // Numbers of another size, from memory and into it.
  template <typename T>
  static I widened(const T* p) {
    typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
    Narrow v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, I);
  }
  template <typename T>
  static void store_narrow(T* p, I v) {
    typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
    const Narrow narrow = __builtin_convertvector(v, Narrow);
    std::memcpy(p, &narrow, sizeof narrow);
  }
  // W bits of a mask, from bit t on.
  static void set(std::uint64_t* mask, std::size_t t, std::uint64_t bits) {
    *mask = (*mask & ~(~std::uint64_t(0) >> (64 - W) << t)) | bits << t;
  }
  static I all(std::int32_t v) { return I{} + v; }
  static I min_of(I a, I b) { return Isa::least(a, b); }
  static I max_of(I a, I b) { return Isa::most(a, b); }
  static I clamp(I v, std::int32_t limit) { return max_of(min_of(v, all(limit)), all(-limit)); }
  static I shift_right(I v, int by) { return (I)((U)v >> by); }
  static F as_float(I v) { return (F)v; }
  static I as_bits(F v) { return (I)v; }
  static F to_float(I v) { return __builtin_convertvector(v, F); }
  static I to_int(F v) { return __builtin_convertvector(v, I); }
  // 0, 1, 2, ...
  static I lanes() {
    I v;
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
  }
};

// Division, for instruction sets without an estimate of it; for Isa to derive from.
template <class F>
struct Divided {
  static F reciprocal(F v) { return 1.0f / v; }
};

// Some lanes of a vector side by side, for instruction sets that cannot part them; for Isa to
// derive from.
template <class I>
struct LaneByLane {
  // Those whose bit is set; room for a vector is written.
  static void pack(std::int32_t* to, std::uint64_t lanes, I v) {
    for (; lanes; lanes &= lanes - 1) *to++ = v[__builtin_ctzll(lanes)];
  }
  // The other way; other lanes are 0.
  static I unpacked(const std::int32_t* from, std::uint64_t lanes) {
    I v = {};
    for (; lanes; lanes &= lanes - 1) v[__builtin_ctzll(lanes)] = *from++;
    return v;
  }
};

// A density's tables with what stands at one place side by side, for instruction sets that fetch it
// one place after the other; for Isa's Table and Search to derive from.
struct Paired {
  const std::int32_t* pair;
  static constexpr int kNear = kCells;
  Paired(const Densities& d, std::size_t shape)
      : pair(d.from_rise + 2 * kCells * shape - 2 * kFirstCell) {}
};
struct Fours {
  const float* four;
  Fours(const Densities& d, std::size_t shape) : four(d.search_four + 4 * kSteps * shape) {}
};

// Products of 64 bits, of even and of odd lanes apart, for instruction sets whose widest product of
// signed numbers is that; for Isa to derive from. Isa has
//   Wide           a vector of 64-bit numbers
//   mul(a, b)      products of the even lanes
//   odd(v)         the odd lanes where the even ones were
//   joined<S>(even, odd)  32 bits from bit S on of both
template <class Isa, class I, class Wide>
struct WideProducts {
  template <int S>
  static I product(I a, I b) {
    return Isa::template joined<S>(Isa::mul(a, b), Isa::mul(Isa::odd(a), Isa::odd(b)));
  }
  // The same, rounded to the nearest.
  template <int S>
  static I scaled(I a, I b) {
    const Wide half = Wide{} + (1ll << (S - 1));
    return Isa::template joined<S>(Isa::mul(a, b) + half,
                                   Isa::mul(Isa::odd(a), Isa::odd(b)) + half);
  }
  // a*c + b*s, 2^14 being 1.
  static I turned(I a, I c, I b, I s) {
    const Wide half = Wide{} + (1ll << 13);
    const Wide even = Isa::mul(a, c) + Isa::mul(b, s);
    const Wide odd = Isa::mul(Isa::odd(a), Isa::odd(c)) + Isa::mul(Isa::odd(b), Isa::odd(s));
    return Isa::template joined<14>(even + half, odd + half);
  }
};

}  // namespace
}  // namespace kvzip::predictive
