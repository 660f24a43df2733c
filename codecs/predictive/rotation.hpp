// RoPE as models turn a pair of keys in bf16, and what a pair was before.
//
// native/rotation_kernels.hpp has the same for `channel`, and shares the geometry alone. The
// formats differ in what a reader makes of a pair: -0 stays -0 here, and numbers that are too small
// or too large count as 0, where `channel` has exceptions. And the searches look for different
// pairs: here for one in the midst of others, or the nearest to what is expected; there for the
// first in another order, which is not 0 where other numbers do as well. All of this shows in the
// bytes.
#pragma once

#include "predictive/vectors.hpp"

namespace kvzip::predictive {
namespace {

template <class V>
struct Two {
  V first, second;
};

template <class Isa>
struct Rotation : Vectors<Isa> {
  using Base = Vectors<Isa>;
  using Base::all, Base::as_bits, Base::as_float, Base::max_of, Base::min_of;
  using typename Base::F, typename Base::I, typename Base::U;

  // Of each pair: 0, or from 2^-40 to 2^20, so that no product with a number that counts is too
  // small or too large.
  F cosine, sine;
  bool rounds_products;  // or sums alone

  static F number(I bits) { return as_float(bits << 16); }
  static F size(F v) { return as_float(as_bits(v) & 0x7fffffff); }
  // To the nearest number of bf16, ties to even.
  static F rounded(F v) {
    const U bits = (U)v;
    return (F)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
  }

  // A number before RoPE is from 2^-60 to 2^61; any other counts as 0.
  static constexpr std::int32_t kLeast = 127 - 60, kMost = 127 + 60;
  static I counted(I bits) {
    const I exponent = bits >> 7 & 255;
    return bits & (((exponent >= kLeast) & (exponent <= kMost)) | 0x8000);
  }
  // What RoPE makes of a pair, given by the bits of its numbers: sums of two products, rounded.
  Two<I> turned(Two<I> pair) const {
    return turned(number(counted(pair.first)), number(counted(pair.second)));
  }
  F product(F a, F by) const { return rounds_products ? rounded(a * by) : a * by; }
  Two<I> turned(F a, F b) const {
    return {bits_of(rounded(product(a, cosine) - product(b, sine))),
            bits_of(rounded(product(b, cosine) + product(a, sine)))};
  }
  static I bits_of(F v) { return (I)((U)v >> 16); }

  // About what RoPE turns into a pair.
  Two<I> nearest(Two<I> pair) const {
    const Two<F> about = turned_back(number(pair.first), number(pair.second));
    return {bits_of(about.first), bits_of(about.second)};
  }
  // A pair that RoPE turns into this one, where one was found.
  struct Unturned {
    Two<I> pair;
    I found;
  };
  // The first pair of those that `unturned` tries, which mostly is one.
  Unturned at_once(Two<I> pair) const {
    const Sums s(*this, pair);
    const F narrow = middle(s, s.start);
    return s.unturned(s.start, narrow, fits(s, s.start, narrow));
  }
  // Of a few such pairs the first, which is in the midst of them; or where `weight` is not 0, the
  // one that is nearest to what is expected, `weight` times how far it is from `centre`. Which one
  // it is has no bearing on the format. It is looked for until those that are `wanted`, a bit each,
  // are found.
  Unturned unturned(Two<I> pair, Two<F> centre, Two<F> weight, std::uint64_t wanted) const {
    const bool weighed =
        Isa::below(all(0), as_bits(weight.first) | as_bits(weight.second)) & wanted;
    const Sums s(*this, pair);
    const Two<F> wide_one = of(s.swapped, centre, weight),
                 narrow_one = of(~s.swapped, centre, weight);
    F wide_found = F{}, narrow_found = F{}, least = F{};
    I found = all(0);
    for (int i = 0; i < kTries; ++i) {
      const F wide = stepped(s.start, i % 2 ? i / 2 + 1 : -(i / 2)), among = middle(s, wide);
      for (const int k : {0, 1, -1}) {
        const F narrow = stepped(among, k);
        const F away = far(wide, wide_one) + far(narrow, narrow_one);
        const I nearer = i < kNearest ? away < least : all(0);
        const I better = fits(s, wide, narrow) & (~found | nearer);
        wide_found = better ? wide : wide_found;
        narrow_found = better ? narrow : narrow_found;
        least = better ? away : least;
        found |= better;
      }
      if ((!weighed || i + 1 >= kNearest) && !(wanted & ~Isa::below(all(0), found))) break;
    }
    return s.unturned(wide_found, narrow_found, found);
  }

 private:
  Two<F> turned_back(F y1, F y2) const {
    const F scale = 1.0f / (cosine * cosine + sine * sine);
    return {(y1 * cosine + y2 * sine) * scale, (y2 * cosine - y1 * sine) * scale};
  }
  // What RoPE made of a pair, as wide * u + narrow * v: of the number before it that is the
  // greater, so that its own step is the wider, and of the other one. Given the wide one, the sums
  // say between what the narrow one lies.
  struct Sums {
    F y1, y2;
    I swapped;  // the second number is the wide one
    F start;    // about the wide one
    F u1, u2, v1, v2;
    F by1, by2;      // 1 / v
    F room1, room2;  // half a step of the sums, in narrow ones

    Sums(const Rotation& r, Two<I> pair) : y1(number(pair.first)), y2(number(pair.second)) {
      const Two<F> about = r.turned_back(y1, y2);
      swapped = size(about.second) > size(about.first);
      start = rounded(swapped ? about.second : about.first);
      u1 = swapped ? -r.sine : r.cosine, v1 = swapped ? r.cosine : -r.sine;
      u2 = swapped ? r.cosine : r.sine, v2 = swapped ? r.sine : r.cosine;
      by1 = 1.0f / v1, by2 = 1.0f / v2;
      room1 = half_step(y1) * size(by1), room2 = half_step(y2) * size(by2);
    }
    Unturned unturned(F wide, F narrow, I found) const {
      return {{bits_of(swapped ? narrow : wide), bits_of(swapped ? wide : narrow)}, found};
    }
  };
  F middle(const Sums& s, F wide) const {
    const F q1 = (s.y1 - product(wide, s.u1)) * s.by1, q2 = (s.y2 - product(wide, s.u2)) * s.by2;
    const F low = greater(q1 - s.room1, q2 - s.room2), high = Isa::less(q1 + s.room1, q2 + s.room2);
    return rounded((low + high) * 0.5f);
  }
  // Whether `turned` makes both sums of the two.
  I fits(const Sums& s, F wide, F narrow) const {
    const F z1 = rounded(product(wide, s.u1) + product(narrow, s.v1)),
            z2 = rounded(product(wide, s.u2) + product(narrow, s.v2));
    // What is no number comes in other bits from other processors.
    return counts(wide) & counts(narrow) & (as_bits(z1) == as_bits(s.y1)) &
           (as_bits(z2) == as_bits(s.y2));
  }
  // Of the wide number: if nothing is found before, and where the nearest is looked for.
  static constexpr int kTries = 7, kNearest = 3;
  // What is expected of a pair's first number, or of the second, and its weight.
  static Two<F> of(I second, Two<F> centre, Two<F> weight) {
    return {second ? centre.second : centre.first, second ? weight.second : weight.first};
  }
  static F far(F v, Two<F> expected) { return size(v - expected.first) * expected.second; }
  // Whether a number before RoPE is one that counts, or 0.
  static I counts(F v) {
    const I bits = as_bits(size(v));
    return (bits == 0) | ((bits >= kLeast << 23) & (bits < (kMost + 1) << 23));
  }
  // Half of the step between a number of bf16 and the next.
  static F half_step(F v) { return as_float(as_bits(v) & 0x7f800000) * 0x1p-8f; }
  static F stepped(F v, int steps) { return as_float(as_bits(v) + steps * 65536); }
  static F greater(F a, F b) { return -Isa::less(-a, -b); }
};

}  // namespace
}  // namespace kvzip::predictive
