// Tables: from counts to levels, from levels to what kernels look up.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "channel/kernels.hpp"

namespace kvzip::channel {

bool make_alias(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                int exponent_bits, Alias* alias) {
  Alias& a = *alias;
  a = {};
  a.escape = kNone;
  std::uint32_t weight[kBuckets], total = 0, n = 0;
  const auto add = [&](std::uint32_t level, std::uint32_t value) {
    if (n == kBuckets) return false;
    weight[n] = level * level;
    total += weight[n];
    a.value[n++] = value;
    return true;
  };
  for (std::size_t i = 0; i < 2 * width; ++i)
    if (levels[i] && !add(levels[i], std::uint32_t((i & 1) << exponent_bits | i >> 1))) return false;
  if (escape_level) {
    if (!add(escape_level, 0)) return false;
    a.escape = n - 1;
  }
  if (n == 0) return false;
  a.symbols = n;
  // Frequencies: proportional, at least 1, what is missing or too much at the most frequent.
  std::uint32_t sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    a.freq[i] = std::max<std::uint32_t>(1, weight[i] * kTotal / total);
    sum += a.freq[i];
  }
  for (; sum != kTotal; sum += sum < kTotal ? 1 : -1)
    *std::max_element(a.freq, a.freq + n) += sum < kTotal ? 1 : -1;
  // Vose's alias method in integers: each bucket of 32 slots gets one symbol and one more.
  std::uint32_t left[kBuckets];
  std::uint8_t small[2 * kBuckets], large[kBuckets];
  std::size_t smalls = 0, larges = 0, next_small = 0, next_large = 0;
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    left[i] = a.freq[i];
    a.divide[i] = kBucketSlots;
    if (left[i] < kBucketSlots) small[smalls++] = std::uint8_t(i);
    else large[larges++] = std::uint8_t(i);
  }
  while (next_small < smalls) {
    const std::size_t s = small[next_small++], l = large[next_large];
    a.divide[s] = left[s];
    a.other[s] = std::uint32_t(l);
    left[l] -= kBucketSlots - left[s];
    if (left[l] < kBucketSlots) {
      small[smalls++] = std::uint8_t(l);
      ++next_large;
    }
  }
  return true;
}

void make_decoder(const Alias& a, Decoder* decoder) {
  std::uint32_t rank[kBuckets], entry[kBuckets];
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    rank[i] = a.divide[i];
    entry[i] = a.freq[i] | a.value[i] << kValueAt | (i == a.escape ? kEscapeBit : 0);
  }
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    const std::uint32_t o = a.other[i];
    if (a.divide[i] == kBucketSlots) {
      decoder->own[i] = 0;
      decoder->other[i] = entry[i];
    } else {
      decoder->own[i] = entry[i] | a.divide[i] << 27;
      decoder->other[i] = entry[o] | (rank[o] - a.divide[i]) << 21;
      rank[o] += kBucketSlots - a.divide[i];
    }
  }
}

void make_encoder(const Alias& a, Encoder* encoder) {
  std::uint32_t start = 0, rank[kBuckets];
  std::uint32_t none = kNoCell | 1;
  for (std::uint32_t s = 0; s < a.symbols; ++s) {
    encoder->reciprocal[s] = ((std::uint64_t(1) << 42) + a.freq[s] - 1) / a.freq[s];
    rank[s] = start + a.divide[s];
    for (std::uint32_t r = 0; r < a.divide[s]; ++r)
      encoder->slot[start + r] = std::uint16_t(s * kBucketSlots + r);
    if (s == a.escape) none = a.freq[s] | start << kStartAt | s << kSymbolAt | kEscapeCell;
    start += a.freq[s];
  }
  for (std::uint32_t i = 0; i < kBuckets; ++i)
    for (std::uint32_t p = a.divide[i]; p < kBucketSlots; ++p)
      encoder->slot[rank[a.other[i]]++] = std::uint16_t(i * kBucketSlots + p);
  encoder->slot[kTotal] = 0;
  std::fill_n(encoder->cell, kMaxSymbols, none);
  start = 0;
  for (std::uint32_t s = 0; s < a.symbols; ++s) {
    if (s != a.escape) encoder->cell[a.value[s]] = a.freq[s] | start << kStartAt | s << kSymbolAt;
    start += a.freq[s];
  }
}

template <typename T>
void count(const Block<const T>& block, std::size_t heads, std::size_t dim, int mantissa_bits,
           int value_bits, std::uint32_t* counts, const T* first, std::uint8_t* same) {
  for (std::size_t b = 0; b < block.batch; ++b)
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < block.tokens; ++t) {
        const T* row = block.data + std::ptrdiff_t(b) * block.batch_stride +
                       std::ptrdiff_t(h) * block.head_stride +
                       std::ptrdiff_t(t) * block.token_stride;
        for (std::size_t c = 0; c < dim; ++c) {
          const std::size_t channel = h * dim + c;
          ++counts[(channel << value_bits) + (row[c] >> mantissa_bits)];
          same[channel] &= row[c] == first[channel];
        }
      }
}

bool choose_levels(const std::uint32_t* counts, std::uint32_t exponents, std::uint64_t outside,
                   std::uint8_t* levels, std::uint32_t* lowest, std::size_t* width,
                   std::uint8_t* escape_level) {
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

template void count(const Block<const std::uint8_t>&, std::size_t, std::size_t, int, int,
                    std::uint32_t*, const std::uint8_t*, std::uint8_t*);
template void count(const Block<const std::uint16_t>&, std::size_t, std::size_t, int, int,
                    std::uint32_t*, const std::uint16_t*, std::uint8_t*);
template void count(const Block<const std::uint32_t>&, std::size_t, std::size_t, int, int,
                    std::uint32_t*, const std::uint32_t*, std::uint8_t*);

}  // namespace kvzip::channel
