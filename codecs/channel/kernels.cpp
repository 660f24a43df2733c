#include "channel/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvzip::channel {
namespace {

inline std::uint16_t load16(const std::uint8_t* p) {
  std::uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

inline std::size_t up8(std::size_t n) { return (n + 7) / 8 * 8; }

// --- mantissas -------------------------------------------------------------------------------
// The low 8*(m/8) bits go as whole bytes, the m%8 bits above them packed over eight tokens.

inline int rows_of_octet(int mantissa_bits) { return 8 * (mantissa_bits / 8) + mantissa_bits % 8; }

// r-bit fields of eight tokens into r bytes, and back.
template <int R>
inline void pack(const std::uint8_t f[8], std::uint8_t row[R]) {
  static_assert(R == 2 || R == 3 || R == 7, "a field width of one of the formats");
  if constexpr (R == 7) {
    for (int j = 0; j < 7; ++j) row[j] = std::uint8_t(f[j] | (f[7] >> j & 1) << 7);
  } else if constexpr (R == 3) {
    const unsigned rest = f[6] | f[7] << 3;
    for (int j = 0; j < 3; ++j)
      row[j] = std::uint8_t(f[2 * j] | f[2 * j + 1] << 3 | (rest >> 2 * j & 3) << 6);
  } else {
    for (int j = 0; j < 2; ++j)
      row[j] = std::uint8_t(f[4 * j] | f[4 * j + 1] << 2 | f[4 * j + 2] << 4 | f[4 * j + 3] << 6);
  }
}

template <int R>
inline void unpack(const std::uint8_t row[R], std::uint8_t f[8]) {
  if constexpr (R == 7) {
    unsigned last = 0;
    for (int j = 0; j < 7; ++j) {
      f[j] = row[j] & 0x7F;
      last |= unsigned(row[j] >> 7) << j;
    }
    f[7] = std::uint8_t(last);
  } else if constexpr (R == 3) {
    unsigned rest = 0;
    for (int j = 0; j < 3; ++j) {
      f[2 * j] = row[j] & 7;
      f[2 * j + 1] = row[j] >> 3 & 7;
      rest |= unsigned(row[j] >> 6) << 2 * j;
    }
    f[6] = rest & 7;
    f[7] = std::uint8_t(rest >> 3);
  } else {
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) f[4 * j + i] = row[j] >> 2 * i & 3;
  }
}

// Calls step(group's first token, its tokens, batch row, head, strip's first channel, its
// channels) in the order of the format.
template <typename Step>
inline void for_each_strip(std::size_t batch, std::size_t heads, std::size_t tokens,
                           std::size_t dim, Step step) {
  for (std::size_t t = 0; t < tokens; t += kLanes)
    for (std::size_t b = 0; b < batch; ++b)
      for (std::size_t h = 0; h < heads; ++h)
        for (std::size_t c = 0; c < dim; c += kStrip)
          step(t, std::min<std::size_t>(kLanes, tokens - t), b, h, c,
               std::min<std::size_t>(kStrip, dim - c));
}

// The strip's channels that are not constant; returns how many.
inline std::size_t live_channels(const Channel* channels, std::size_t n, std::uint8_t live[kStrip]) {
  std::size_t count = 0;
  for (std::size_t c = 0; c < n; ++c)
    if (!channels[c].constant) live[count++] = std::uint8_t(c);
  return count;
}

template <typename T, int M>
void encode_mantissas_of(const Tables& tables, const Block<const T>& block, std::uint8_t* out) {
  constexpr int R = M % 8, B = M / 8;
  for_each_strip(block.batch, tables.heads, block.tokens, tables.dim,
      [&](std::size_t t, std::size_t lanes, std::size_t b, std::size_t h, std::size_t c0,
          std::size_t n) {
        const Channel* channels = tables.channels + h * tables.dim + c0;
        std::uint8_t live[kStrip];
        const std::size_t count = live_channels(channels, n, live);
        for (std::size_t o = 0; o < lanes; o += 8) {
          for (std::size_t k = 0; k < count; ++k) {
            std::uint8_t fields[8] = {}, rows[R];
            for (std::size_t i = 0; i < std::min<std::size_t>(8, lanes - o); ++i) {
              const T x = block.data[std::ptrdiff_t(b) * block.batch_stride +
                                     std::ptrdiff_t(h) * block.head_stride +
                                     std::ptrdiff_t(t + o + i) * block.token_stride +
                                     std::ptrdiff_t(c0 + live[k])];
              for (int j = 0; j < B; ++j) out[(8 * j + i) * count + k] = std::uint8_t(x >> 8 * j);
              fields[i] = std::uint8_t(x >> 8 * B) & ((1 << R) - 1);
            }
            for (std::size_t i = lanes - o; i < 8; ++i)
              for (int j = 0; j < B; ++j) out[(8 * j + i) * count + k] = 0;
            pack<R>(fields, rows);
            for (int j = 0; j < R; ++j) out[(8 * B + j) * count + k] = rows[j];
          }
          out += rows_of_octet(M) * count;
        }
      });
}

// --- decoding a tile ------------------------------------------------------------------------

// One step of each lane: `values[j]` becomes lane j's sign and exponent (relative to the base).
// Returns the words that are left, or null when they ran out. Lanes with an escape set `escaped`.
inline const std::uint8_t* decode_step(const Decoder& d, std::uint32_t* states, std::size_t lanes,
                                       std::uint16_t base, const std::uint8_t* words,
                                       const std::uint8_t* end, std::uint16_t* values,
                                       std::uint32_t* escaped) {
  // A step takes one word a lane at most; where fewer are left each is checked.
  const bool checked = std::size_t(end - words) < 2 * lanes;
  std::uint32_t any = 0;
  for (std::size_t j = 0; j < lanes; ++j) {
    std::uint32_t x = states[j];
    const std::uint32_t bucket = x >> 5 & 31, place = x & 31;
    const std::uint32_t e = place < d.divide[bucket] ? d.own[bucket] : d.other[bucket];
    x = (e & 0x7FF) * (x >> kProbBits) + ((place + (e >> 11)) & 0x7FF);
    if (x < kLow) {
      if (checked && words == end) return nullptr;
      x = x << 16 | load16(words);
      words += 2;
    }
    states[j] = x;
    values[j] = std::uint16_t((e >> 22 & 0x1FF) + base);
    any |= e;
    if (e >> 31) values[j] |= 0x8000;
  }
  *escaped = any >> 31;
  return words;
}

template <typename T, int M>
bool decode_of(const Tables& tables, const Block<T>& block, const std::uint8_t* state_bytes,
               const std::uint8_t* escapes, std::size_t escape_count,
               const std::uint8_t* mantissas, const std::uint8_t* words, std::size_t word_count) {
  constexpr int R = M % 8, B = M / 8;
  const std::uint8_t* const words_end = words + 2 * word_count;
  const std::uint8_t* const escapes_end = escapes + 2 * escape_count;
  const std::uint32_t value_mask = (1u << tables.value_bits) - 1;
  std::uint32_t states[kLanes];
  const std::size_t all_lanes = std::min<std::size_t>(kLanes, block.tokens);
  std::memcpy(states, state_bytes, 4 * all_lanes);
  for (std::size_t j = 0; j < all_lanes; ++j)
    if (states[j] < kLow) return false;
  bool good = true;
  alignas(64) std::uint16_t tile[kStrip][kLanes];
  for_each_strip(block.batch, tables.heads, block.tokens, tables.dim,
      [&](std::size_t t, std::size_t lanes, std::size_t b, std::size_t h, std::size_t c0,
          std::size_t n) {
        if (!good) return;
        const Channel* channels = tables.channels + h * tables.dim + c0;
        std::uint8_t live[kStrip];
        const std::size_t count = live_channels(channels, n, live);
        for (std::size_t k = 0; k < count; ++k) {
          const Channel& channel = channels[live[k]];
          std::uint32_t escaped;
          words = decode_step(tables.decoders[channel.shape], states, lanes, channel.base, words,
                              words_end, tile[k], &escaped);
          if (!words) {
            good = false;
            return;
          }
          if (escaped)
            for (std::size_t j = 0; j < lanes; ++j)
              if (tile[k][j] & 0x8000) {
                if (escapes == escapes_end) {
                  good = false;
                  return;
                }
                tile[k][j] = load16(escapes);
                escapes += 2;
              }
        }
        T* const corner = block.data + std::ptrdiff_t(b) * block.batch_stride +
                          std::ptrdiff_t(h) * block.head_stride +
                          std::ptrdiff_t(t) * block.token_stride + std::ptrdiff_t(c0);
        for (std::size_t o = 0; o < lanes; o += 8) {
          const std::size_t rows = std::min<std::size_t>(8, lanes - o);
          for (std::size_t k = 0; k < count; ++k) {
            std::uint8_t packed[R], fields[8];
            for (int j = 0; j < R; ++j) packed[j] = mantissas[(8 * B + j) * count + k];
            unpack<R>(packed, fields);
            for (std::size_t i = 0; i < rows; ++i) {
              std::uint32_t x = (tile[k][o + i] & value_mask) << M | std::uint32_t(fields[i]) << 8 * B;
              for (int j = 0; j < B; ++j)
                x |= std::uint32_t(mantissas[(8 * j + i) * count + k]) << 8 * j;
              corner[std::ptrdiff_t(o + i) * block.token_stride + live[k]] = T(x);
            }
          }
          mantissas += rows_of_octet(M) * count;
        }
        if (count < n)
          for (std::size_t c = 0; c < n; ++c)
            if (channels[c].constant)
              for (std::size_t j = 0; j < lanes; ++j)
                corner[std::ptrdiff_t(j) * block.token_stride + std::ptrdiff_t(c)] =
                    T(channels[c].number);
      });
  if (!good || words != words_end || escapes != escapes_end) return false;
  // The encoder began at the lowest state, so the decoder must end there.
  for (std::size_t j = 0; j < all_lanes; ++j)
    if (states[j] != kLow) return false;
  return true;
}

}  // namespace

// --- tables ----------------------------------------------------------------------------------

bool make_shape(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                int exponent_bits, Decoder* decoder, Encoder* encoder) {
  std::uint32_t freq[kBuckets] = {}, value[kBuckets] = {}, weight[kBuckets] = {};
  std::size_t n = 0;
  std::uint32_t total = 0;
  std::memset(encoder->symbol, kNone, sizeof encoder->symbol);
  for (std::size_t i = 0; i <= 2 * width; ++i) {
    const std::uint32_t level = i < 2 * width ? levels[i] : escape_level;
    if (!level) continue;
    if (n == kBuckets) return false;
    weight[n] = level * level;
    total += weight[n];
    value[n] = i < 2 * width ? std::uint32_t((i & 1) << exponent_bits | i >> 1) : 0;
    if (i < 2 * width) encoder->symbol[value[n]] = std::uint8_t(n);
    ++n;
  }
  if (n == 0) return false;
  encoder->escape = escape_level ? std::uint8_t(n - 1) : kNone;
  // Frequencies: proportional, at least 1, what is missing or too much at the most frequent.
  std::uint32_t sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    freq[i] = std::max<std::uint32_t>(1, weight[i] * kTotal / total);
    sum += freq[i];
  }
  for (; sum != kTotal; sum += sum < kTotal ? 1 : -1)
    *std::max_element(freq, freq + n) += sum < kTotal ? 1 : -1;
  // Vose's alias method in integers: each bucket of 32 slots gets one symbol and one more.
  std::uint32_t left[kBuckets], divide[kBuckets], other[kBuckets] = {};
  std::uint8_t small[2 * kBuckets], large[kBuckets];
  std::size_t smalls = 0, larges = 0, next_small = 0, next_large = 0;
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    left[i] = freq[i];
    divide[i] = kBucketSlots;
    if (left[i] < kBucketSlots) small[smalls++] = std::uint8_t(i);
    else large[larges++] = std::uint8_t(i);
  }
  while (next_small < smalls) {
    const std::size_t s = small[next_small++], l = large[next_large];
    divide[s] = left[s];
    other[s] = std::uint32_t(l);
    left[l] -= kBucketSlots - left[s];
    if (left[l] < kBucketSlots) {
      small[smalls++] = std::uint8_t(l);
      ++next_large;
    }
  }
  std::uint32_t start = 0, rank[kBuckets];
  for (std::size_t i = 0; i < n; ++i) {
    encoder->freq[i] = std::uint16_t(freq[i]);
    encoder->start[i] = std::uint16_t(start);
    for (std::uint32_t r = 0; r < divide[i]; ++r)
      encoder->slot[start + r] = std::uint16_t(i * kBucketSlots + r);
    rank[i] = divide[i];
    start += freq[i];
  }
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    const std::uint32_t o = other[i];
    const auto escape = [&](std::uint32_t s) { return std::uint32_t(s == encoder->escape); };
    decoder->divide[i] = divide[i];
    decoder->own[i] = entry(freq[i], 0, value[i], escape(i));
    decoder->other[i] = entry(freq[o], rank[o] - divide[i], value[o], escape(o));
    if (divide[i] < kBucketSlots)
      for (std::uint32_t p = divide[i]; p < kBucketSlots; ++p)
        encoder->slot[encoder->start[o] + rank[o]++] = std::uint16_t(i * kBucketSlots + p);
  }
  return true;
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

// --- blocks ----------------------------------------------------------------------------------

std::size_t mantissa_bytes(const Tables& tables, std::size_t batch, std::size_t tokens) {
  std::size_t live = 0;
  for (std::size_t c = 0; c < tables.heads * tables.dim; ++c) live += !tables.channels[c].constant;
  return batch * up8(tokens) / 8 * std::size_t(rows_of_octet(tables.mantissa_bits)) * live;
}

template <typename T>
bool encode_values(const Tables& tables, const Block<const T>& block, std::uint16_t* words_end,
                   std::uint16_t* escapes_end, Streams* streams) {
  const std::uint32_t mask = (1u << tables.value_bits) - 1;
  std::uint16_t *word = words_end, *escaped = escapes_end;
  for (std::uint32_t& x : streams->states) x = kLow;
  const std::size_t strips = (tables.dim + kStrip - 1) / kStrip;
  const std::size_t groups = (block.tokens + kLanes - 1) / kLanes;
  // The decoder's order of strips, channels and lanes, backwards.
  for (std::size_t g = groups; g-- > 0;)
    for (std::size_t b = block.batch; b-- > 0;)
      for (std::size_t h = tables.heads; h-- > 0;)
        for (std::size_t s = strips; s-- > 0;)
          for (std::size_t c = std::min<std::size_t>(tables.dim, (s + 1) * kStrip);
               c-- > s * kStrip;) {
            const Channel& channel = tables.channels[h * tables.dim + c];
            if (channel.constant) continue;
            const Encoder& e = tables.encoders[channel.shape];
            const std::size_t lanes = std::min<std::size_t>(kLanes, block.tokens - g * kLanes);
            const T* column = block.data + std::ptrdiff_t(b) * block.batch_stride +
                              std::ptrdiff_t(h) * block.head_stride +
                              std::ptrdiff_t(g * kLanes) * block.token_stride + std::ptrdiff_t(c);
            for (std::size_t j = lanes; j-- > 0;) {
              const std::uint32_t value =
                  std::uint32_t(column[std::ptrdiff_t(j) * block.token_stride] >> tables.mantissa_bits);
              std::uint8_t symbol = e.symbol[(value - channel.base) & mask];
              if (symbol == kNone) {
                symbol = e.escape;
                if (symbol == kNone) return false;
                *--escaped = std::uint16_t(value);
              }
              const std::uint32_t freq = e.freq[symbol];
              std::uint32_t x = streams->states[j];
              if (x >= std::uint64_t(freq) << 22) {
                *--word = std::uint16_t(x);
                x >>= 16;
              }
              streams->states[j] = (x / freq << kProbBits) + e.slot[e.start[symbol] + x % freq];
            }
          }
  streams->words = std::size_t(words_end - word);
  streams->escapes = std::size_t(escapes_end - escaped);
  return true;
}

template <typename T>
void encode_mantissas(const Tables& tables, const Block<const T>& block, std::uint8_t* out) {
  switch (tables.mantissa_bits) {
    case 2: return encode_mantissas_of<T, 2>(tables, block, out);
    case 3: return encode_mantissas_of<T, 3>(tables, block, out);
    case 7: return encode_mantissas_of<T, 7>(tables, block, out);
    case 10: return encode_mantissas_of<T, 10>(tables, block, out);
    case 23: return encode_mantissas_of<T, 23>(tables, block, out);
  }
}

template <typename T>
bool decode(const Tables& tables, const Block<T>& block, const std::uint8_t* states,
            const std::uint8_t* escapes, std::size_t escape_count, const std::uint8_t* mantissas,
            const std::uint8_t* words, std::size_t word_count) {
  const auto with = [&](auto f) {
    return f(tables, block, states, escapes, escape_count, mantissas, words, word_count);
  };
  switch (tables.mantissa_bits) {
    case 2: return with(decode_of<T, 2>);
    case 3: return with(decode_of<T, 3>);
    case 7: return with(decode_of<T, 7>);
    case 10: return with(decode_of<T, 10>);
    case 23: return with(decode_of<T, 23>);
  }
  return false;
}

#define KVZIP_INSTANTIATE(T)                                                                     \
  template void count(const Block<const T>&, std::size_t, std::size_t, int, int, std::uint32_t*, \
                      const T*, std::uint8_t*);                                                  \
  template bool encode_values(const Tables&, const Block<const T>&, std::uint16_t*,              \
                              std::uint16_t*, Streams*);                                         \
  template void encode_mantissas(const Tables&, const Block<const T>&, std::uint8_t*);           \
  template bool decode(const Tables&, const Block<T>&, const std::uint8_t*, const std::uint8_t*, \
                       std::size_t, const std::uint8_t*, const std::uint8_t*, std::size_t);
KVZIP_INSTANTIATE(std::uint8_t)
KVZIP_INSTANTIATE(std::uint16_t)
KVZIP_INSTANTIATE(std::uint32_t)
#undef KVZIP_INSTANTIATE

}  // namespace kvzip::channel
