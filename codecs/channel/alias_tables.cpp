// Tables: from counts to levels, from levels to what kernels look up.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "channel/kernels.hpp"

namespace kvzip::channel {

bool are_levels(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level) {
  std::size_t n = escape_level != 0;
  for (std::size_t i = 0; i < 2 * width; ++i) n += levels[i] != 0;
  return n > 0 && n <= kBuckets;
}

namespace {

void make_symbols(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Alias* alias) {
  Alias& a = *alias;
  a.exponent_bits = exponent_bits;
  a.escape = kNone;
  a.width = std::uint32_t(width);
  std::uint32_t weight[kBuckets + 1], value[kBuckets + 1], total = 0;
  std::size_t n = 0;
  for (std::size_t i = 0; i < 2 * width; ++i) {  // a level of 0 is overwritten by the next
    weight[n] = std::uint32_t(levels[i]) * levels[i];
    value[n] = std::uint32_t((i & 1) << exponent_bits | i >> 1);
    total += weight[n];
    n += levels[i] != 0;
  }
  if (escape_level) {
    weight[n] = std::uint32_t(escape_level) * escape_level;
    value[n] = 0;
    total += weight[n];
    a.escape = std::uint32_t(n++);
  }
  a.symbols = std::uint32_t(n);
  for (std::size_t i = 0; i < kBuckets; ++i) {
    a.value[i] = i < n ? value[i] : 0;
    a.freq[i] = 0;
  }
  // Frequencies: proportional, at least 1. The division is exact: numerator times denominator is
  // below 2^52.
  const std::uint64_t reciprocal = (std::uint64_t(1) << 52) / (2 * total) + 1;
  std::uint32_t sum = 0, greatest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto scaled = std::uint32_t((2 * kTotal * weight[i] + total) * reciprocal >> 52);
    a.freq[i] = std::max<std::uint32_t>(1, scaled);
    sum += a.freq[i];
    // The first of equals wins; which one it is need not be foreseen.
    greatest = std::max(greatest, a.freq[i] * kBuckets + (kBuckets - 1 - std::uint32_t(i)));
  }
  a.freq[kBuckets - 1 - greatest % kBuckets] += kTotal - sum;
}

}  // namespace

Alias make_alias(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                 int exponent_bits) {
  Alias a;
  make_symbols(levels, width, escape_level, exponent_bits, &a);
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    a.divide[i] = kBucketSlots;
    a.other[i] = 0;
    a.add[i] = 0;
  }
  // A sweep over the small and the large ones, each in order. All together fill the buckets: there
  // is a large one as long as there is a small one.
  const auto next_large = [&](std::uint32_t i) {
    while (i < kBuckets && a.freq[i] < kBucketSlots) ++i;
    return i;
  };
  std::uint32_t l = next_large(0), left = a.freq[l];
  for (std::uint32_t s = 0; s < kBuckets; ++s) {
    if (a.freq[s] >= kBucketSlots) continue;
    std::uint32_t bucket = s, own = a.freq[s], from = l;
    for (;;) {
      left -= kBucketSlots - own;
      a.divide[bucket] = own;
      a.other[bucket] = from;
      a.add[bucket] = left - own;
      if (left >= kBucketSlots) break;
      // `l` has become small itself, unless it was the last.
      const std::uint32_t next = next_large(l + 1);
      if (next == kBuckets) break;
      bucket = l, own = left, from = next;
      l = next, left = a.freq[l];
    }
  }
  return a;
}

void make_decoder(const Alias& a, Decoder* decoder) {
  Decoder& d = *decoder;
  std::uint32_t entry[kBuckets];
  for (std::uint32_t i = 0; i < kBuckets; ++i) entry[i] = a.freq[i] | a.value[i] << kValueAt;
  if (a.escape != kNone) entry[a.escape] |= kEscapeBit;
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    const bool whole = a.divide[i] == kBucketSlots;
    const std::uint32_t second = entry[a.other[i]] | a.add[i] << kAddAt;
    d.entry[i] = whole ? 0 : entry[i] | a.divide[i] << kDivideAt;
    d.entry[kBuckets + i] = whole ? entry[i] : second;
  }
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    d.divide[i] = std::uint8_t(a.divide[i]);
    d.other[i] = std::uint8_t(a.other[i]);
    d.add[0][i] = std::uint8_t(a.add[i]);
    d.add[1][i] = std::uint8_t(a.add[i] >> 8);
    d.freq[0][i] = std::uint8_t(a.freq[i]);
    d.freq[1][i] = std::uint8_t(a.freq[i] >> 8);
    const std::uint32_t sign = a.value[i] >> a.exponent_bits;
    d.value[i] = std::uint8_t(sign << 7 | (a.value[i] & 0x7F));
  }
  d.escape = std::uint8_t(a.escape);
}

namespace {

// Calls with each piece of slots that follow each other as their ranks do: first rank, first slot,
// and the slot behind the last.
template <typename Use>
void each_piece(const Alias& a, const std::uint32_t* starts, const Use& use) {
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    const std::uint32_t first = i * kBucketSlots, middle = first + a.divide[i];
    if (a.divide[i]) use(starts[i], first, middle);
    if (a.divide[i] < kBucketSlots)
      use(starts[a.other[i]] + a.divide[i] + a.add[i], middle, first + kBucketSlots);
  }
}

// How many bits of each byte are set; not all processors have an instruction for it.
std::uint32_t ones_of_bytes(std::uint32_t bits) {
  bits -= bits >> 1 & 0x55555555;
  bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333);
  return (bits + (bits >> 4)) & 0x0F0F0F0F;
}
std::uint32_t ones(std::uint32_t bits) { return ones_of_bytes(bits) * 0x01010101 >> 24; }

void make_pieces(const Alias& a, const std::uint32_t* starts, Encoder* e) {
  std::fill(std::begin(e->begins), std::end(e->begins), 0);
  std::fill(std::begin(e->shift), std::end(e->shift), std::uint16_t(0));
  each_piece(a, starts, [&](std::uint32_t rank, std::uint32_t, std::uint32_t) {
    e->begins[rank / 32] |= 1u << rank % 32;
  });
  std::uint32_t before = ~0u;
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    e->before[i] = before;
    before += ones(e->begins[i]);
  }
  each_piece(a, starts, [&](std::uint32_t rank, std::uint32_t slot, std::uint32_t) {
    const std::uint32_t begun = e->begins[rank / 32] << (31 - rank % 32);
    e->shift[e->before[rank / 32] + ones(begun)] = std::uint16_t(slot - rank);
  });
}

void make_bytes(const Alias& a, const std::uint32_t* starts, int exponent_bits, Encoder* e) {
  std::memset(e->held, 0, sizeof e->held);
  e->above_half = *std::max_element(std::begin(a.freq), std::end(a.freq)) > kTotal / 2;
  for (std::uint32_t s = 0; s < kBuckets; ++s) {
    for (int i = 0; i < 2; ++i) {
      e->freq[i][s] = std::uint8_t(a.freq[s] >> 8 * i);
      e->start[i][s] = std::uint8_t(starts[s] >> 8 * i);
    }
    const bool holds = s < a.symbols && s != a.escape;
    const std::uint32_t value = a.value[s], exponent = value & ((1u << exponent_bits) - 1);
    e->value[s] = holds ? std::uint16_t(value) : kNoValue;
    if (holds && exponent < kBuckets)
      e->held[value >> exponent_bits][exponent] = std::uint8_t(kHeld | s);
  }
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    const std::uint32_t before = e->before[i], in_bytes = ones_of_bytes(e->begins[i]) * 0x01010100;
    for (int k = 0; k < 4; ++k) {
      e->octet_begins[k][i] = std::uint8_t(e->begins[i] >> 8 * k);
      e->octet_before[k][i] = std::uint8_t(before + (in_bytes >> 8 * k));
    }
  }
  for (std::uint32_t i = 0; i < 2 * kBuckets; ++i)
    for (int k = 0; k < 2; ++k) e->shift_bytes[k][i] = std::uint8_t(e->shift[i] >> 8 * k);
}

}  // namespace

void make_encoder(const Alias& a, int exponent_bits, simd::Level level, Encoder* encoder) {
  std::uint32_t starts[kBuckets], none = kNoCell | 1;
  for (std::uint32_t s = 0, start = 0; s < kBuckets; start += a.freq[s++]) {
    starts[s] = start;
    if (s == a.escape) none = a.freq[s] | start << kStartAt | s << kSymbolAt | kEscapeCell;
  }
  encoder->outside = none;
  encoder->width = a.width;
  const bool avx2 = level == simd::Level::avx2, avx512 = level == simd::Level::avx512;
  if (avx2 || avx512) make_pieces(a, starts, encoder);
  if (avx2) return make_bytes(a, starts, exponent_bits, encoder);
  std::fill(std::begin(encoder->cell), std::end(encoder->cell), none);
  for (std::uint32_t s = 0; s < a.symbols; ++s)
    if (s != a.escape)
      encoder->cell[a.value[s]] = a.freq[s] | starts[s] << kStartAt | s << kSymbolAt;
  if (avx512) return;
  for (std::uint32_t s = 0; s < a.symbols; ++s)
    encoder->reciprocal[s] = ((std::uint64_t(1) << 42) + a.freq[s] - 1) / a.freq[s];
  each_piece(a, starts, [&](std::uint32_t rank, std::uint32_t slot, std::uint32_t end) {
    while (slot < end) encoder->slot[rank++] = std::uint16_t(slot++);
  });
}

namespace {

template <int M, typename T, typename C>
void count_fields(const Block<const T>& block, std::size_t heads, std::size_t dim, C* counts) {
  constexpr int kBits = 8 * sizeof(T);
  constexpr std::size_t kStride = count_stride(kBits - M), kInWord = 8 / sizeof(T);
  constexpr std::uint64_t kMask = (std::uint64_t(1) << (kBits - M)) - 1;
  for (std::size_t b = 0; b < block.batch; ++b)
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < block.tokens; ++t) {
        const T* row = block.data + std::ptrdiff_t(b) * block.batch_stride +
                       std::ptrdiff_t(h) * block.head_stride +
                       std::ptrdiff_t(t) * block.token_stride;
        C* at = counts + h * dim * kStride;
        std::size_t c = 0;
        // Two words of numbers at a time: counting keeps the processor busy with loads as it is.
        for (; c + 2 * kInWord <= dim; c += 2 * kInWord, at += 2 * kInWord * kStride) {
          std::uint64_t words[2];
          std::memcpy(words, row + c, 16);
#pragma GCC unroll 16
          for (std::size_t k = 0; k < 2 * kInWord; ++k)
            ++at[k * kStride + (words[k / kInWord] >> (kBits * (k % kInWord) + M) & kMask)];
        }
        for (; c < dim; ++c, at += kStride) ++at[std::size_t(row[c]) >> M];
      }
}

}  // namespace

template <typename T, typename C>
void count(const Block<const T>& block, std::size_t heads, std::size_t dim, int mantissa_bits,
           C* counts) {
  switch (mantissa_bits) {  // that the shift is known saves a third
    case 7: return count_fields<7>(block, heads, dim, counts);
    case 10: return count_fields<10 % (8 * sizeof(T))>(block, heads, dim, counts);
    case 23: return count_fields<23 % (8 * sizeof(T))>(block, heads, dim, counts);
    case 3: return count_fields<3>(block, heads, dim, counts);
    default: return count_fields<2>(block, heads, dim, counts);
  }
}

template <typename T>
bool constant(const Block<const T>& block, std::size_t head, std::size_t channel) {
  const T* first = block.data + std::ptrdiff_t(head) * block.head_stride + std::ptrdiff_t(channel);
  for (std::size_t b = 0; b < block.batch; ++b)
    for (std::size_t t = 0; t < block.tokens; ++t)
      if (first[std::ptrdiff_t(b) * block.batch_stride + std::ptrdiff_t(t) * block.token_stride] !=
          *first)
        return false;
  return true;
}

bool choose_levels(const std::uint32_t* counts, std::uint32_t exponents, std::uint32_t most,
                   std::uint64_t outside, std::uint8_t* levels, std::uint32_t* lowest,
                   std::size_t* width, std::uint8_t* escape_level) {
  std::uint64_t total = outside, seen = 0;
  for (std::uint32_t v = 0; v < 2 * exponents; ++v) {
    total += counts[v];
    seen += counts[v] != 0;
  }
  if (!seen) return false;
  // A table holds 32 symbols. Where more occur, the rarest share an escape.
  std::uint32_t least = 1;
  std::uint64_t kept = seen;
  for (std::uint32_t limit = 2; kept > kBuckets - std::uint64_t(outside || least > 1); ++limit) {
    least = limit;
    kept = 0;
    for (std::uint32_t v = 0; v < 2 * exponents; ++v) kept += counts[v] >= least;
    if (limit > 16) limit += limit / 4;
  }
  const auto holds = [&](std::uint32_t e) {
    return counts[e] >= least || counts[exponents + e] >= least;
  };
  std::uint32_t low = 0, high = exponents - 1;
  while (low < high && !holds(low)) ++low;
  while (high > low && !holds(high)) --high;
  // A lone rare exponent far below the others would make the window wide.
  for (std::uint32_t next = low + 1; next <= high; ++next) {
    if (!holds(next)) continue;
    if (next - low > 3 && counts[low] + counts[exponents + low] <= 2) low = next;
    else break;
  }
  const auto rarer = [&](std::uint32_t a, std::uint32_t b) {
    return counts[a] + counts[exponents + a] <= counts[b] + counts[exponents + b];
  };
  while (high - low >= most) rarer(low, high) ? ++low : --high;
  *lowest = low;
  *width = high - low + 1;
  outside = total;
  const auto level = [&](std::uint64_t n) {
    const double root = std::sqrt(double(n) / double(total)) * 32.0;
    return std::uint8_t(std::max(1.0, std::floor(root + 0.5)));
  };
  for (std::uint32_t e = 0; e < *width; ++e)
    for (std::uint32_t sign = 0; sign < 2; ++sign) {
      const std::uint32_t n = counts[sign * exponents + low + e];
      levels[2 * e + sign] = n >= least ? level(n) : 0;
      outside -= n >= least ? n : 0;
    }
  *escape_level = outside ? level(outside) : 0;
  return true;
}

#define KVZIP_INSTANTIATE(T)                                                                 \
  template void count(const Block<const T>&, std::size_t, std::size_t, int, std::uint8_t*);  \
  template void count(const Block<const T>&, std::size_t, std::size_t, int, std::uint32_t*); \
  template bool constant(const Block<const T>&, std::size_t, std::size_t);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
KVZIP_INSTANTIATE(std::uint32_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::channel
