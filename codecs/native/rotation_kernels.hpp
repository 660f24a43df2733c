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

// Angles come in groups of so many pairs. Two numbers of bf16 make a word: of halves the numbers of
// an even pair and of the next, so that of each group the even ones come first; of pairs side by
// side both numbers of one.
constexpr std::size_t kGroup = 32;
constexpr std::size_t grouped(std::size_t pairs) { return (pairs + kGroup - 1) / kGroup * kGroup; }
constexpr std::size_t place_of(std::size_t pair, bool side_by_side) {
  if (side_by_side) return pair;
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
  std::size_t most;        // where more are missing, it may give up
  std::uint64_t* missing;  // has room for [tokens, pairs]
};

using Turn = void (*)(const TurnWork& work);
using Unturn = std::size_t (*)(const UnturnWork& work);  // returns how many are missing

struct Kernels {
  Turn turn[2][2];  // of halves, of pairs side by side; rounded each time, rounded once
  Unturn unturn[2][2];
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

// How 2 W pairs of a key lie in memory and in two vectors of words, of which each holds two
// numbers, and in two vectors each of their first and of their second numbers.
template <int W>
struct Halves {
  using V = Vectors<W, false>;
  using F = typename V::F;
  using U = typename V::U;

  // Where a pair's first number lies, and how far behind it the second.
  static std::size_t place(std::size_t pair) { return pair; }
  static std::size_t apart(std::size_t pairs) { return pairs; }
  // How far behind the first vector's numbers the second's lie, and how many of n pairs' numbers
  // are in each.
  static std::size_t next(std::size_t pairs) { return pairs; }
  static std::size_t numbers(std::size_t n, int /*v*/) { return n; }
  // Where the angles of pairs in a vector lie, and which of the pairs these are.
  static std::size_t angles(std::size_t pair, int v) {
    return pair / kGroup * kGroup + pair % kGroup / 2 + std::size_t(v) * (kGroup / 2);
  }
  static U numbered(int v) { return 2 * V::numbered() + std::uint32_t(v); }

  static F first(const U (&words)[2], int v) { return v ? V::odd(words[0]) : V::even(words[0]); }
  static F second(const U (&words)[2], int v) { return v ? V::odd(words[1]) : V::even(words[1]); }
  static void join(const F (&first)[2], const F (&second)[2], U (&words)[2]) {
    words[0] = V::joined(first[0], first[1]);
    words[1] = V::joined(second[0], second[1]);
  }
};
template <int W>
struct SideBySide {
  using V = Vectors<W, false>;
  using F = typename V::F;
  using U = typename V::U;

  static std::size_t place(std::size_t pair) { return 2 * pair; }
  static std::size_t apart(std::size_t) { return 1; }
  static std::size_t next(std::size_t) { return 2 * W; }
  static std::size_t numbers(std::size_t n, int v) {
    const std::size_t before = n < W ? n : W;
    return 2 * (v ? n - before : before);
  }
  static std::size_t angles(std::size_t pair, int v) { return pair + std::size_t(v) * W; }
  static U numbered(int v) { return V::numbered() + std::uint32_t(v * W); }

  static F first(const U (&words)[2], int v) { return V::even(words[v]); }
  static F second(const U (&words)[2], int v) { return V::odd(words[v]); }
  static void join(const F (&first)[2], const F (&second)[2], U (&words)[2]) {
    for (const int v : {0, 1}) words[v] = V::joined(first[v], second[v]);
  }
};

// The words of n pairs, at most 2 W, and zeros.
template <int W, typename Pairing>
void load_words(const std::uint16_t* key, std::size_t pairs, std::size_t n,
                typename Vectors<W, false>::U (&words)[2]) {
  const std::uint16_t* const next = key + Pairing::next(pairs);
  if (n == 2 * W) {
    std::memcpy(&words[0], key, sizeof words[0]);
    std::memcpy(&words[1], next, sizeof words[1]);
  } else {
    std::memset(words, 0, sizeof words);
    std::memcpy(&words[0], key, 2 * Pairing::numbers(n, 0));
    std::memcpy(&words[1], next, 2 * Pairing::numbers(n, 1));
  }
}
template <int W, typename Pairing>
void store_words(const typename Vectors<W, false>::U (&words)[2], std::size_t pairs, std::size_t n,
                 std::uint16_t* key) {
  std::uint16_t* const next = key + Pairing::next(pairs);
  std::memcpy(key, &words[0], n == 2 * W ? sizeof words[0] : 2 * Pairing::numbers(n, 0));
  std::memcpy(next, &words[1], n == 2 * W ? sizeof words[1] : 2 * Pairing::numbers(n, 1));
}

template <int W, bool kEach, typename Pairing>
void turn_keys(const TurnWork& work) {
  using V = Vectors<W, kEach>;
  using F = typename V::F;
  using U = typename V::U;
  const std::size_t padded = grouped(work.pairs);
  std::uint16_t* key = work.keys;
  const float *cos = work.angles, *sin = cos + padded;
  const auto turn = [&](std::size_t pair, std::size_t n) {
    std::uint16_t* const numbers = key + Pairing::place(pair);
    U words[2];
    F y1[2], y2[2];
    load_words<W, Pairing>(numbers, work.pairs, n, words);
    for (const int v : {0, 1}) {
      const F a = Pairing::first(words, v), b = Pairing::second(words, v);
      const std::size_t at = Pairing::angles(pair, v);
      const F c = V::template load<F>(cos + at), s = V::template load<F>(sin + at);
      y1[v] = V::turned1(a, b, c, s), y2[v] = V::turned2(a, b, c, s);
    }
    Pairing::join(y1, y2, words);
    store_words<W, Pairing>(words, work.pairs, n, numbers);
  };
  for (std::size_t t = 0; t < work.tokens; ++t) {
    std::size_t pair = 0;
    for (; pair + 2 * W <= work.pairs; pair += 2 * W) turn(pair, 2 * W);
    if (pair < work.pairs) turn(pair, work.pairs - pair);
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
template <int W, bool kEach, typename Pairing>
class Unturning {
 public:
  explicit Unturning(const UnturnWork& work) : work_(work), padded_(grouped(work.pairs)) {}

  // How many pairs are missing.
  std::size_t run() {
    for (std::size_t t = 0; t < work_.tokens && missing_ <= work_.most; ++t)
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

  // Pairs of one key, in two vectors.
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
    const std::size_t place = Pairing::place(pair);
    U words[2];
    load_words<W, Pairing>(work_.keys + std::ptrdiff_t(t) * work_.token_stride + place, work_.pairs,
                           n, words);
    const float *const cos = work_.angles + 2 * t * padded_, *const sin = cos + padded_;
    Pairs& pairs = pairs_[begun_++];
    pairs.count = n;
    pairs.place = std::uint32_t(t << kTokenAt | pair);
    pairs.out = work_.out + std::ptrdiff_t(t) * work_.out_token_stride + place;
    for (const int v : {0, 1}) {
      const std::size_t at = Pairing::angles(pair, v);
      pairs.search[v].begin(Pairing::first(words, v), Pairing::second(words, v),
                            V::template load<F>(cos + at), V::template load<F>(sin + at));
    }
  }

  // The first attempts of those that were begun.
  void finish() {
    for (std::size_t i = 0; i < begun_; ++i)
      for (Search& search : pairs_[i].search) search.take(0);
    for (std::size_t i = 0; i < begun_; ++i) {
      Pairs& pairs = pairs_[i];
      F k1[2], k2[2];
      for (const int v : {0, 1}) {
        Search& search = pairs.search[v];
        const I found = search.attempt(0);
        k1[v] = search.k1(), k2[v] = search.k2();
        const U pair = Pairing::numbered(v);
        wait(~found & (I)(pair < std::uint32_t(pairs.count)),
             pairs.place + pair + ((U)search.swap() & kSwapped), search);
      }
      U words[2];
      Pairing::join(k1, k2, words);
      store_words<W, Pairing>(words, work_.pairs, pairs.count, pairs.out);
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
        std::uint16_t* const out = work_.out +
                                   std::ptrdiff_t(token_of(at)) * work_.out_token_stride +
                                   Pairing::place(at & kPairMask);
        // Which of the two comes first cannot be foreseen, so there is no branch.
        const std::size_t apart = Pairing::apart(work_.pairs), first = at / kSwapped * apart;
        out[first] = std::uint16_t(wide[j] >> 16);
        out[apart - first] = std::uint16_t(narrow[j] >> 16);
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

template <int W, bool kEach, typename Pairing>
std::size_t unturn_keys(const UnturnWork& work) {
  return Unturning<W, kEach, Pairing>(work).run();
}

template <int W>
constexpr Kernels kernels_of() {
  return {{{turn_keys<W, true, Halves<W>>, turn_keys<W, false, Halves<W>>},
           {turn_keys<W, true, SideBySide<W>>, turn_keys<W, false, SideBySide<W>>}},
          {{unturn_keys<W, true, Halves<W>>, unturn_keys<W, false, Halves<W>>},
           {unturn_keys<W, true, SideBySide<W>>, unturn_keys<W, false, SideBySide<W>>}}};
}

}  // namespace
}  // namespace kvzip::rotation
