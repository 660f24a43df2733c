// What a set of instructions does with keys; W numbers of 32 bits make a vector. Floating point, in
// single steps of IEEE 754 that come out alike everywhere: what turned a key is checked by turning
// it again.
//
// `predictive` looks for other pairs, and turns them by a format of its own:
// predictive/rotation.hpp says why it has its own search.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kvzip::rotation {

// Angles come in groups of so many pairs, of each group the even ones first: two numbers of bf16
// make a word, whose halves are the next even one and the next odd one.
constexpr std::size_t kGroup = 32;
constexpr std::size_t grouped(std::size_t pairs) { return (pairs + kGroup - 1) / kGroup * kGroup; }
constexpr std::size_t place_of(std::size_t pair) {
  return pair / kGroup * kGroup + pair % 2 * (kGroup / 2) + pair % kGroup / 2;
}

// Keys of one head, tokens that follow each other.
struct TurnWork {
  std::uint16_t* keys;
  std::ptrdiff_t token_stride;
  const float* angles;  // cosines, then sines, of each token
  std::size_t tokens, pairs;
};
struct UnturnWork {
  const std::uint16_t* keys;
  std::ptrdiff_t token_stride;
  std::uint16_t* out;
  std::ptrdiff_t out_token_stride;
  const float* angles;
  std::size_t tokens, pairs;
  std::uint64_t* missing;  // has room for [tokens, pairs]
};

using Turn = void (*)(const TurnWork& work);
using Unturn = std::size_t (*)(const UnturnWork& work);  // returns how many are missing

struct Kernels {
  Turn turn[2];  // rounded each time, rounded once
  Unturn unturn[2];
};

extern const Kernels baseline;
#ifdef KVZIP_X86
extern const Kernels avx2, avx512;
#endif

namespace {

// Vectors of N bytes.
template <int N>
struct Bytes;
#define KVZIP_VECTORS(N)                                             \
  template <>                                                        \
  struct Bytes<N> {                                                  \
    typedef float F __attribute__((vector_size(N)));                 \
    typedef std::uint32_t U __attribute__((vector_size(N)));         \
    typedef std::int32_t I __attribute__((vector_size(N)));          \
    typedef std::int64_t Wide __attribute__((vector_size(N)));       \
    typedef std::uint8_t Byte __attribute__((vector_size((N) / 4))); \
  };
KVZIP_VECTORS(16)
KVZIP_VECTORS(32)
KVZIP_VECTORS(64)
#undef KVZIP_VECTORS

template <int W, bool kEach>
struct Vectors {
  using F = typename Bytes<4 * W>::F;
  using U = typename Bytes<4 * W>::U;
  using I = typename Bytes<4 * W>::I;
  using Wide = typename Bytes<4 * W>::Wide;
  using Byte = typename Bytes<4 * W>::Byte;

  static U bits(F v) { return (U)v; }
  template <typename V>
  static V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, U v) { std::memcpy(p, &v, sizeof v); }
  // The even and the odd ones of 2 W numbers of bf16, and the numbers that two vectors of bf16
  // make.
  static F even(U words) { return (F)(words << 16); }
  static F odd(U words) { return (F)(words & 0xFFFF0000u); }
  static U joined(F even, F odd) { return bits(even) >> 16 | (bits(odd) & 0xFFFF0000u); }

  static F all(float v) { return F{} + v; }
  static F choose(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }
  static F magnitude(F v) { return (F)(bits(v) & 0x7FFFFFFFu); }
  static bool any(I mask) {
    const Wide wide = (Wide)mask;
    std::int64_t found = 0;
    for (int i = 0; i < W / 2; ++i) found |= wide[i];
    return found != 0;
  }
  // A bit of a byte for each number of a mask, eight numbers at a time.
  static constexpr std::size_t kMasks = (W + 7) / 8;
  static void masks(I mask, std::uint64_t* out) {
    const Byte bytes = __builtin_convertvector((U)mask & 1u, Byte);
    std::memset(out, 0, kMasks * sizeof *out);
    std::memcpy(out, &bytes, sizeof bytes);
  }

  // To bf16, to the nearest and of two as near ones to the even one: next to 1.5 * 2^16 times its
  // power of two a number has as many bits. Not for what is not finite; -0 becomes 0.
  static F rounded(F v) {
    const U power = bits(v) & 0x7F800000u;
#ifdef __AVX512F__
    if constexpr (W == 16) {
      const __m512 p = (__m512)power, by = _mm512_set1_ps(0x1.8p16f);
      return (F)_mm512_fnmadd_ps(p, by, _mm512_fmadd_ps(p, by, (__m512)v));
    }
#endif
    const F far = (F)(power + 0x08400000u);
    return (v + far) - far;
  }
  static F product(F a, F b) { return kEach ? rounded(a * b) : a * b; }
  // So many steps of bf16 away from 0.
  static F stepped(F v, int steps) { return (F)(bits(v) + (std::uint32_t(steps) << 16)); }
  // Half of the step of bf16 at a number.
  static F half_step(F v) { return (F)(bits(v) & 0x7F800000u) * all(0x1p-8f); }

  static F turned1(F a, F b, F cos, F sin) { return rounded(product(a, cos) - product(b, sin)); }
  static F turned2(F a, F b, F cos, F sin) { return rounded(product(b, cos) + product(a, sin)); }

  // Of what is nothing, or neither so small nor so large that an intermediate could be.
  static I ordinary(F v) {
    const F m = magnitude(v);
    return (I)(m == F{}) | (I)((m > all(0x1p-40f)) & (m < all(0x1p60f)));
  }

  // A search for numbers that turn to y1 and y2.
  //
  // The larger of the two has the wider steps. Few of them come into question, and for each the
  // other, narrower number follows from whichever of y1 and y2 says more of it.
  class Search {
   public:
    Search(F y1, F y2, F cos, F sin) : y1_(y1), y2_(y2) {
      const F over = 1.0f / (cos * cos + sin * sin);
      const F a = (y1 * cos + y2 * sin) * over, b = (y2 * cos - y1 * sin) * over;
      swap_ = (I)(magnitude(b) > magnitude(a));
      wide_ = found_wide_ = rounded(choose(swap_, b, a));
      // y1 = wide * wide1 + narrow * narrow1, and y2 alike.
      wide1_ = choose(swap_, -sin, cos), narrow1_ = choose(swap_, cos, -sin);
      wide2_ = choose(swap_, cos, sin), narrow2_ = choose(swap_, sin, cos);
      has1_ = (I)(narrow1_ != F{}), has2_ = (I)(narrow2_ != F{});
      over1_ = 1.0f / choose(has1_, narrow1_, all(1.0f));
      over2_ = 1.0f / choose(has2_, narrow2_, all(1.0f));
      room1_ = choose(has1_, half_step(y1) * magnitude(over1_), all(0x1p100f));
      room2_ = choose(has2_, half_step(y2) * magnitude(over2_), all(0x1p100f));
    }

    // Takes the wide number that is so many steps from the nearest, and the narrow one in the
    // middle of what y1 and y2 allow with it.
    void take(int steps) {
      taken_ = stepped(wide_, steps);
      part1_ = product(taken_, wide1_), part2_ = product(taken_, wide2_);
      const F at1 = choose(has1_, (y1_ - part1_) * over1_, F{});
      const F at2 = choose(has2_, (y2_ - part2_) * over2_, F{});
      const F low1 = at1 - room1_, low2 = at2 - room2_, high1 = at1 + room1_, high2 = at2 + room2_;
      const F low = choose((I)(low1 > low2), low1, low2);
      const F high = choose((I)(high1 < high2), high1, high2);
      const F middle = (low + high) * 0.5f, aside = (high - low) * 0.25f;
      narrow_ = rounded(choose((I)(magnitude(middle) < aside), middle + aside, middle));
    }

    // Tries what was taken, with the narrow number so many steps away. Where they are found.
    I attempt(int steps) {
      const F narrow = stepped(narrow_, steps);
      const F z1 = rounded(part1_ + product(narrow, narrow1_));
      const F z2 = rounded(part2_ + product(narrow, narrow2_));
      const I good = (I)(bits(z1) == bits(y1_)) & (I)(bits(z2) == bits(y2_)) & ordinary(taken_) &
                     ordinary(narrow) & ~found_;
      found_wide_ = choose(good, taken_, found_wide_);
      found_narrow_ = choose(good, narrow, found_narrow_);
      found_ |= good;
      return found_;
    }

    I first() {
      take(0);
      found_narrow_ = narrow_;
      return attempt(0);
    }
    I others() {
      // Beyond these there is hardly ever one.
      for (const int wide : {1, -1, 0, 2, -2}) {
        take(wide);
        for (const int narrow : {0, 1, -1})
          if (!any(~attempt(narrow))) return found_;
      }
      return found_;
    }

    F k1() const { return choose(swap_, found_narrow_, found_wide_); }
    F k2() const { return choose(swap_, found_wide_, found_narrow_); }

   private:
    F y1_, y2_, wide_, wide1_, narrow1_, wide2_, narrow2_, over1_, over2_, room1_, room2_;
    F taken_, part1_, part2_, narrow_;
    F found_wide_, found_narrow_;
    I swap_, has1_, has2_, found_ = I{};
  };
};

// Calls use(a, b, pair, angles) for 2 W pairs of one key after the other, numbers of bf16 and where
// they lie, and `angles`, the place of their even ones' angles.
template <int W, typename Key, typename Use>
void each_pairs(Key* key, std::size_t pairs, const Use& use) {
  for (std::size_t i = 0; i < pairs; i += 2 * W) {
    const std::size_t n = pairs - i < 2 * W ? pairs - i : 2 * W;
    const std::size_t at = i / kGroup * kGroup + i % kGroup / 2;
    if (n == 2 * W) {
      use(key + i, key + pairs + i, i, at);
    } else {
      std::uint16_t a[2 * W] = {}, b[2 * W] = {};
      std::memcpy(a, key + i, 2 * n);
      std::memcpy(b, key + pairs + i, 2 * n);
      use(a, b, i, at);
      if constexpr (!std::is_const<Key>::value) {
        std::memcpy(key + i, a, 2 * n);
        std::memcpy(key + pairs + i, b, 2 * n);
      }
    }
  }
}

template <int W, bool kEach>
void turn_keys(const TurnWork& work) {
  using V = Vectors<W, kEach>;
  using F = typename V::F;
  using U = typename V::U;
  const std::size_t padded = grouped(work.pairs);
  std::uint16_t* key = work.keys;
  const float *cos = work.angles, *sin = cos + padded;
  for (std::size_t t = 0; t < work.tokens; ++t) {
    each_pairs<W>(
        key, work.pairs, [&](std::uint16_t* a, std::uint16_t* b, std::size_t, std::size_t at) {
          const U first = V::template load<U>(a), second = V::template load<U>(b);
          const F c = V::template load<F>(cos + at), s = V::template load<F>(sin + at);
          const std::size_t next = at + kGroup / 2;
          const F d = V::template load<F>(cos + next), r = V::template load<F>(sin + next);
          const F a0 = V::even(first), b0 = V::even(second);
          const F a1 = V::odd(first), b1 = V::odd(second);
          V::store(a, V::joined(V::turned1(a0, b0, c, s), V::turned1(a1, b1, d, r)));
          V::store(b, V::joined(V::turned2(a0, b0, c, s), V::turned2(a1, b1, d, r)));
        });
    key += work.token_stride;
    cos += 2 * padded;
    sin += 2 * padded;
  }
}

// Pairs that the first attempt did not find, to be tried together.
template <int W, bool kEach>
class Waiting {
 public:
  using V = Vectors<W, kEach>;
  using F = typename V::F;

  explicit Waiting(const UnturnWork& work) : work_(work) {}

  void add(const std::uint16_t* key, float cos, float sin, std::uint16_t* out,
           std::uint64_t place) {
    in_[0][count_] = std::uint32_t(key[0]) << 16;
    in_[1][count_] = std::uint32_t(key[work_.pairs]) << 16;
    angle_[0][count_] = cos;
    angle_[1][count_] = sin;
    out_[count_] = out;
    place_[count_] = place;
    if (++count_ == W) settle();
  }

  // Tries all that wait; how many pairs were missing so far.
  std::size_t settle() {
    if (!count_) return missing_;
    typename V::Search search(V::template load<F>(in_[0]), V::template load<F>(in_[1]),
                              V::template load<F>(angle_[0]), V::template load<F>(angle_[1]));
    search.first();
    const typename V::I found = search.others();
    const typename V::U k1 = V::bits(search.k1()), k2 = V::bits(search.k2());
    for (std::size_t j = 0; j < count_; ++j) {
      out_[j][0] = std::uint16_t((found[j] ? k1[j] : in_[0][j]) >> 16);
      out_[j][work_.pairs] = std::uint16_t((found[j] ? k2[j] : in_[1][j]) >> 16);
      if (!found[j]) work_.missing[missing_++] = place_[j];
    }
    std::memset(in_, 0, sizeof in_);
    count_ = 0;
    return missing_;
  }

 private:
  const UnturnWork& work_;
  std::uint32_t in_[2][W] = {};
  float angle_[2][W] = {};
  std::uint16_t* out_[W];
  std::uint64_t place_[W];
  std::size_t count_ = 0, missing_ = 0;
};

template <int W, bool kEach>
std::size_t unturn_keys(const UnturnWork& work) {
  using V = Vectors<W, kEach>;
  using F = typename V::F;
  using U = typename V::U;
  Waiting<W, kEach> waiting(work);
  const std::size_t pairs = work.pairs, padded = grouped(pairs);
  const std::uint16_t* key = work.keys;
  const float *cos = work.angles, *sin = cos + padded;
  std::uint16_t* out = work.out;
  for (std::size_t t = 0; t < work.tokens; ++t) {
    each_pairs<W>(
        key, pairs,
        [&](const std::uint16_t* a, const std::uint16_t* b, std::size_t pair, std::size_t at) {
          const U first = V::template load<U>(a), second = V::template load<U>(b);
          std::uint64_t left[2][V::kMasks];
          F k1[2], k2[2];
          for (const int odd : {0, 1}) {
            const std::size_t angle = at + std::size_t(odd) * kGroup / 2;
            typename V::Search search(
                odd ? V::odd(first) : V::even(first), odd ? V::odd(second) : V::even(second),
                V::template load<F>(cos + angle), V::template load<F>(sin + angle));
            V::masks(~search.first(), left[odd]);
            k1[odd] = search.k1();
            k2[odd] = search.k2();
          }
          const U joined[2] = {V::joined(k1[0], k1[1]), V::joined(k2[0], k2[1])};
          const std::size_t n = pairs - pair < 2 * W ? pairs - pair : 2 * W;
          std::memcpy(out + pair, &joined[0], 2 * n);
          std::memcpy(out + pairs + pair, &joined[1], 2 * n);
          for (const int odd : {0, 1})
            for (std::size_t m = 0; m < V::kMasks; ++m)
              for (std::uint64_t rest = left[odd][m]; rest; rest &= rest - 1) {
                const std::size_t lane = 8 * m + std::size_t(__builtin_ctzll(rest)) / 8;
                const std::size_t j = pair + 2 * lane + std::size_t(odd);
                if (j < pairs)
                  waiting.add(key + j, cos[place_of(j)], sin[place_of(j)], out + j, t * pairs + j);
              }
        });
    key += work.token_stride;
    out += work.out_token_stride;
    cos += 2 * padded;
    sin += 2 * padded;
  }
  return waiting.settle();
}

template <int W>
constexpr Kernels kernels_of() {
  return {{turn_keys<W, true>, turn_keys<W, false>}, {unturn_keys<W, true>, unturn_keys<W, false>}};
}

}  // namespace
}  // namespace kvzip::rotation
