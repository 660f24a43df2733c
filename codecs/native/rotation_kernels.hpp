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

#ifdef __AVX2__
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
#define KVZIP_VECTORS(N)                                       \
  template <>                                                  \
  struct Bytes<N> {                                            \
    typedef float F __attribute__((vector_size(N)));           \
    typedef std::uint32_t U __attribute__((vector_size(N)));   \
    typedef std::int32_t I __attribute__((vector_size(N)));    \
    typedef std::int64_t Wide __attribute__((vector_size(N))); \
  };
KVZIP_VECTORS(16)
KVZIP_VECTORS(32)
KVZIP_VECTORS(64)
#undef KVZIP_VECTORS

#ifdef __AVX2__
// Of each mask of eight numbers, which it has: a byte for each.
struct Orders {
  std::uint64_t of[256] = {};
  constexpr Orders() {
    for (unsigned mask = 0; mask < 256; ++mask)
      for (unsigned i = 0, at = 0; i < 8; ++i)
        if (mask >> i & 1) of[mask] |= std::uint64_t(i) << 8 * at++;
  }
};
constexpr Orders kOrders;
#endif

template <int W, bool kEach>
struct Vectors {
  using F = typename Bytes<4 * W>::F;
  using U = typename Bytes<4 * W>::U;
  using I = typename Bytes<4 * W>::I;
  using Wide = typename Bytes<4 * W>::Wide;

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
  static U numbered() {
    U numbers{};
    for (int i = 0; i < W; ++i) numbers[i] = std::uint32_t(i);
    return numbers;
  }
  template <typename V>
  static V choose(I mask, V a, V b) {
    return mask ? a : b;
  }
  // The second where either is no number, as processors have it.
  template <typename V>
  static V larger(V a, V b) {
    return a > b ? a : b;
  }
  template <typename V>
  static V smaller(V a, V b) {
    return a < b ? a : b;
  }
  static F magnitude(F v) { return (F)(bits(v) & 0x7FFFFFFFu); }
  static bool any(I mask) {
    const Wide wide = (Wide)mask;
    std::int64_t found = 0;
    for (int i = 0; i < W / 2; ++i) found |= wide[i];
    return found != 0;
  }
  // Writes those numbers that a mask has, one after the other; less than W others may lie behind
  // them.
  class Collector {
   public:
    explicit Collector(I mask) : bits_(bits_of(mask)) {}
    std::size_t count() const { return std::size_t(__builtin_popcount(bits_)); }
    template <typename T>
    void put(U numbers, T* out) const {
      static_assert(sizeof *out == sizeof numbers[0]);
#ifdef __AVX512F__
      if constexpr (W == 16)
        return store(out, (U)_mm512_maskz_compress_epi32(__mmask16(bits_), (__m512i)numbers));
#endif
#ifdef __AVX2__
      if constexpr (W == 8) {
        const __m128i order = _mm_cvtsi64_si128(std::int64_t(kOrders.of[bits_]));
        return store(out,
                     (U)_mm256_permutevar8x32_epi32((__m256i)numbers, _mm256_cvtepu8_epi32(order)));
      }
#endif
      for (int i = 0; i < W; ++i) {
        const std::uint32_t number = numbers[i];
        std::memcpy(out, &number, sizeof number);
        out += bits_ >> i & 1;
      }
    }

   private:
    static std::uint32_t bits_of(I mask) {
#ifdef __AVX512F__
      if constexpr (W == 16) return _mm512_movepi32_mask((__m512i)mask);
#endif
#ifdef __AVX2__
      if constexpr (W == 8) return std::uint32_t(_mm256_movemask_ps((__m256)mask));
#endif
      std::uint32_t bits = 0;
      for (int i = 0; i < W; ++i) bits |= std::uint32_t(mask[i] & 1) << i;
      return bits;
    }

    std::uint32_t bits_;
  };

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

  // Where both are nothing, or neither so small nor so large that an intermediate could be.
  static I ordinary(F v, F w) {
    constexpr std::uint32_t kLeast = 0x2B800001, kEnd = 0x5D800000;  // from 2^-40 on, up to 2^60
    const U a = bits(magnitude(v)), b = bits(magnitude(w));
    return (I)(smaller(a - 1, b - 1) >= kLeast - 1) & (I)(larger(a, b) < kEnd);
  }

  // A search for numbers that turn to y1 and y2.
  //
  // The larger of the two has the wider steps. Few of them come into question, and for each the
  // other, narrower number follows from whichever of y1 and y2 says more of it. Where the second is
  // the wide one, the two change places, y1 and y2 do, and the sine changes its sign.
  class Search {
   public:
    void begin(F y1, F y2, F cos, F sin) {
      const F over = 1.0f / (cos * cos + sin * sin);
      const F a = (y1 * cos + y2 * sin) * over, b = (y2 * cos - y1 * sin) * over;
      swap_ = (I)(magnitude(b) > magnitude(a));
      const U sign = (U)swap_ & 0x80000000u;
      prepare(choose(swap_, b, a), choose(swap_, y2, y1), choose(swap_, y1, y2), cos,
              (F)(bits(sin) ^ sign));
    }
    // The same of what has changed places already.
    void begin_again(F y1, F y2, F cos, F sin) {
      swap_ = I{};
      prepare((y1 * cos + y2 * sin) * (1.0f / (cos * cos + sin * sin)), y1, y2, cos, sin);
    }

    // Takes the wide number that is so many steps from the nearest, and the narrow one in the
    // middle of what y1 and y2 allow with it.
    void take(int steps) {
      taken_ = stepped(wide_, steps);
      part1_ = product(taken_, cos_), part2_ = product(taken_, sin_);
      const F at1 = (y1_ - part1_) * over1_, at2 = (y2_ - part2_) * over2_;
      // If the sine is 0, y1 allows anything: its bounds are infinite, or no numbers.
      const F low = larger(at1 - room1_, at2 - room2_), high = smaller(at1 + room1_, at2 + room2_);
      const F middle = (low + high) * 0.5f, aside = (high - low) * 0.25f;
      narrow_ = rounded(choose((I)(magnitude(middle) < aside), middle + aside, middle));
    }

    // Tries what was taken, with the narrow number so many steps away: where they turn to y1 and
    // y2.
    I attempt(int steps) {
      tried_ = stepped(narrow_, steps);
      const F z1 = rounded(part1_ - product(tried_, sin_));
      const F z2 = rounded(part2_ + product(tried_, cos_));
      return (I)(bits(z1) == bits(y1_)) & (I)(bits(z2) == bits(y2_)) & ordinary(taken_, tried_);
    }

    // What was tried, and as the first and the second number.
    F wide() const { return taken_; }
    F narrow() const { return tried_; }
    F k1() const { return choose(swap_, tried_, taken_); }
    F k2() const { return choose(swap_, taken_, tried_); }

    I swap() const { return swap_; }
    F y1() const { return y1_; }
    F y2() const { return y2_; }
    F cos() const { return cos_; }
    F sin() const { return sin_; }

   private:
    // y1 = wide * cos - narrow * sin, and y2 = wide * sin + narrow * cos.
    void prepare(F wide, F y1, F y2, F cos, F sin) {
      wide_ = rounded(wide);
      y1_ = y1, y2_ = y2, cos_ = cos, sin_ = sin;
      over1_ = -1.0f / sin, over2_ = 1.0f / cos;
      room1_ = half_step(y1) * magnitude(over1_), room2_ = half_step(y2) * magnitude(over2_);
    }

    F y1_, y2_, cos_, sin_, over1_, over2_, room1_, room2_, wide_;
    F taken_, part1_, part2_, narrow_, tried_;
    I swap_;
  };
};

// Where the angles of 2 W pairs lie, of the even ones; those of the odd ones are half a group
// behind.
constexpr std::size_t angles_at(std::size_t pair) {
  return pair / kGroup * kGroup + pair % kGroup / 2;
}

// Calls use(a, b, angles) for 2 W pairs of one key after the other, numbers of bf16 and where they
// lie, and `angles`, the place of their even ones' angles.
template <int W, typename Use>
void each_pairs(std::uint16_t* key, std::size_t pairs, const Use& use) {
  for (std::size_t i = 0; i < pairs; i += 2 * W) {
    const std::size_t n = pairs - i < 2 * W ? pairs - i : 2 * W;
    if (n == 2 * W) {
      use(key + i, key + pairs + i, angles_at(i));
    } else {
      std::uint16_t a[2 * W] = {}, b[2 * W] = {};
      std::memcpy(a, key + i, 2 * n);
      std::memcpy(b, key + pairs + i, 2 * n);
      use(a, b, angles_at(i));
      std::memcpy(key + i, a, 2 * n);
      std::memcpy(key + pairs + i, b, 2 * n);
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
    each_pairs<W>(key, work.pairs, [&](std::uint16_t* a, std::uint16_t* b, std::size_t at) {
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

// Finds the keys of one head: most pairs at the first attempt, and the others together, so that
// vectors are full.
//
// What a search does next needs what it did before, so several take each step by turns: a processor
// finds enough to do meanwhile only in what is near.
template <int W, bool kEach>
class Unturning {
 public:
  explicit Unturning(const UnturnWork& work) : work_(work), padded_(grouped(work.pairs)) {}

  // How many pairs are missing.
  std::size_t run() {
    for (std::size_t t = 0; t < work_.tokens; ++t)
      for (std::size_t pair = 0; pair < work_.pairs; pair += 2 * W) {
        begin(t, pair);
        if (begun_ == kBegun) finish();
      }
    finish();
    settle();
    return missing_;
  }

 private:
  using V = Vectors<W, kEach>;
  using F = typename V::F;
  using U = typename V::U;
  using I = typename V::I;
  using Search = typename V::Search;

  // Pairs of one key, the even ones and the odd ones.
  struct Pairs {
    Search search[2];
    std::size_t count;
    std::uint32_t place;
    std::uint16_t* out;
  };
  // A pair's place: its token, one of 256 at most, and its number; and whether the numbers have
  // changed places.
  static constexpr int kTokenAt = 16;
  static constexpr std::uint32_t kPairMask = 0xFFFF, kSwapped = 1u << 31;
  static std::size_t token_of(std::uint32_t place) { return (place & ~kSwapped) >> kTokenAt; }

  static constexpr std::size_t kBegun = 4, kTogether = 8, kWaiting = 512;
  static constexpr std::size_t kRoom = kWaiting + 2 * W * kBegun + W;

  void begin(std::size_t t, std::size_t pair) {
    const std::size_t n = work_.pairs - pair < 2 * W ? work_.pairs - pair : 2 * W;
    const std::uint16_t* a = work_.keys + std::ptrdiff_t(t) * work_.token_stride + pair;
    const std::uint16_t* b = a + work_.pairs;
    std::uint16_t few[2][2 * W];
    if (n < 2 * W) {
      std::memset(few, 0, sizeof few);
      std::memcpy(few[0], a, 2 * n);
      std::memcpy(few[1], b, 2 * n);
      a = few[0], b = few[1];
    }
    const U first = V::template load<U>(a), second = V::template load<U>(b);
    const float *const cos = work_.angles + 2 * t * padded_ + angles_at(pair), *sin = cos + padded_;
    Pairs& pairs = pairs_[begun_++];
    pairs.count = n;
    pairs.place = std::uint32_t(t << kTokenAt | pair);
    pairs.out = work_.out + std::ptrdiff_t(t) * work_.out_token_stride + pair;
    for (const int odd : {0, 1}) {
      const int at = odd * int(kGroup / 2);
      pairs.search[odd].begin(odd ? V::odd(first) : V::even(first),
                              odd ? V::odd(second) : V::even(second), V::template load<F>(cos + at),
                              V::template load<F>(sin + at));
    }
  }

  // The first attempts of those that were begun.
  void finish() {
    for (std::size_t i = 0; i < begun_; ++i)
      for (Search& search : pairs_[i].search) search.take(0);
    for (std::size_t i = 0; i < begun_; ++i) {
      Pairs& pairs = pairs_[i];
      F k1[2], k2[2];
      for (const int odd : {0, 1}) {
        Search& search = pairs.search[odd];
        const I found = search.attempt(0);
        k1[odd] = search.k1(), k2[odd] = search.k2();
        const U pair = 2 * V::numbered() + std::uint32_t(odd);
        wait(~found & (I)(pair < std::uint32_t(pairs.count)),
             pairs.place + pair + ((U)search.swap() & kSwapped), search);
      }
      const U joined[2] = {V::joined(k1[0], k1[1]), V::joined(k2[0], k2[1])};
      if (pairs.count == 2 * W) {
        V::store(pairs.out, joined[0]);
        V::store(pairs.out + work_.pairs, joined[1]);
      } else {
        std::memcpy(pairs.out, &joined[0], 2 * pairs.count);
        std::memcpy(pairs.out + work_.pairs, &joined[1], 2 * pairs.count);
      }
    }
    begun_ = 0;
    if (waiting_ > kWaiting) settle();
  }

  // Those pairs are to be tried again.
  void wait(I which, U places, const Search& search) {
    const typename V::Collector collector(which);
    const std::size_t at = waiting_;
    waiting_ += collector.count();
    collector.put(places, place_ + at);
    collector.put(V::bits(search.y1()), y1_ + at);
    collector.put(V::bits(search.y2()), y2_ + at);
    collector.put(V::bits(search.cos()), cos_ + at);
    collector.put(V::bits(search.sin()), sin_ + at);
  }

  // All other attempts of those that wait, each for those that those before it did not find.
  void settle() {
    try_again([](const auto& with) { with(1, {0, 1, -1}); });
    try_again([](const auto& with) { with(-1, {0, 1, -1}); });
    // Beyond these there is hardly ever one.
    try_again(
        [](const auto& with) { with(0, {1, -1}) || with(2, {0, 1, -1}) || with(-2, {0, 1, -1}); });
    for (std::size_t i = 0; i < waiting_; ++i)
      work_.missing[missing_++] = token_of(place_[i]) * work_.pairs + (place_[i] & kPairMask);
    waiting_ = 0;
  }

  // `attempts` calls with(steps of the wide number, steps of the narrow one), which tells whether
  // all are found. Those that are not wait on.
  template <typename Attempts>
  void try_again(const Attempts& attempts) {
    const std::size_t count = waiting_;
    waiting_ = 0;
    for (std::size_t i = 0; i < count; i += kTogether * W) {
      const std::size_t n = count - i < kTogether * W ? count - i : kTogether * W;
      const std::size_t vectors = (n + W - 1) / W;
      Search search[kTogether];
      U place[kTogether];
      I found[kTogether];
      std::uint32_t wide[kTogether * W], narrow[kTogether * W];
      for (std::size_t v = 0; v < vectors; ++v) {
        const std::size_t at = i + v * W;
        place[v] = V::template load<U>(place_ + at);
        const F y1 = V::template load<F>(y1_ + at), y2 = V::template load<F>(y2_ + at);
        search[v].begin_again(y1, y2, V::template load<F>(cos_ + at),
                              V::template load<F>(sin_ + at));
        V::store(wide + v * W, V::bits(y1)), V::store(narrow + v * W, V::bits(y2));
        found[v] = (I)(V::numbered() >= std::uint32_t(count - at));
      }
      attempts([&](int steps, std::initializer_list<int> others) {
        for (std::size_t v = 0; v < vectors; ++v) search[v].take(steps);
        I all = ~I{};
        for (std::size_t v = 0; v < vectors; ++v) {
          F first = V::template load<F>(wide + v * W), second = V::template load<F>(narrow + v * W);
          for (const int other : others) {
            const I good = search[v].attempt(other) & ~found[v];
            first = V::choose(good, search[v].wide(), first);
            second = V::choose(good, search[v].narrow(), second);
            found[v] |= good;
          }
          V::store(wide + v * W, V::bits(first)), V::store(narrow + v * W, V::bits(second));
          all &= found[v];
        }
        return !V::any(~all);
      });
      for (std::size_t j = 0; j < n; ++j) {
        const std::uint32_t at = place_[i + j];
        std::uint16_t* const out =
            work_.out + std::ptrdiff_t(token_of(at)) * work_.out_token_stride + (at & kPairMask);
        // Which of the two comes first cannot be foreseen, so there is no branch.
        const std::size_t first = at / kSwapped * work_.pairs;
        out[first] = std::uint16_t(wide[j] >> 16);
        out[work_.pairs - first] = std::uint16_t(narrow[j] >> 16);
      }
      for (std::size_t v = 0; v < vectors; ++v) wait(~found[v], place[v], search[v]);
    }
  }

  const UnturnWork& work_;
  const std::size_t padded_;
  Pairs pairs_[kBegun];
  std::size_t begun_ = 0, waiting_ = 0, missing_ = 0;
  // Of each pair that waits.
  std::uint32_t place_[kRoom] = {};
  float y1_[kRoom] = {}, y2_[kRoom] = {}, cos_[kRoom] = {}, sin_[kRoom] = {};
};

template <int W, bool kEach>
std::size_t unturn_keys(const UnturnWork& work) {
  return Unturning<W, kEach>(work).run();
}

template <int W>
constexpr Kernels kernels_of() {
  return {{turn_keys<W, true>, turn_keys<W, false>}, {unturn_keys<W, true>, unturn_keys<W, false>}};
}

}  // namespace
}  // namespace kvzip::rotation
