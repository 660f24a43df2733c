// What a predicted block holds beside its words, in few bits (spec.md): how many words each stream
// has, and the states that a token range begins with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native/rope_rounding.hpp"
#include "predictive/kernels.hpp"
#include "predictive/span.hpp"

namespace kvzip::predictive {

constexpr std::size_t kHeaderBytes = 16;
constexpr std::size_t kCountsAt = 8;  // in the header: where counts begin, which go on elsewhere
// The first byte of a block: of numbers as they are, of one that `channel` codes, and of one that
// is predicted. Those of kind 1 had counts of two bytes; of kind 4 some pairs are as they were
// before RoPE, of which the third byte says how it rounds.
constexpr std::uint8_t kRaw = 0, kByChannel = 2, kPredicted = 3, kUnturned = 4;
constexpr int kMostCountBits = 17;

inline std::size_t round16(std::size_t n) { return (n + 15) / 16 * 16; }
inline bool all_zero(const std::uint8_t* from, const std::uint8_t* to) {
  return std::all_of(from, to, [](std::uint8_t byte) { return byte == 0; });
}

// What is known of a block's streams before their counts: the tokens of each, lane after lane of
// the same ones.
class StreamTokens {
 public:
  StreamTokens(const std::vector<Tile>& tiles, std::size_t lanes) : lanes_(lanes) {
    for (const Tile& tile : tiles)
      for (std::size_t first = 0; first < tile.count; first += kStream) {
        tokens_.push_back(std::min<std::size_t>(kStream, tile.count - first));
        all_ += tokens_.back();
      }
  }
  std::size_t streams() const { return tokens_.size() * lanes_; }
  // A stream's share of so many words. Where there is a stream, there are tokens.
  std::int64_t share(std::size_t stream, std::uint64_t words) const {
    // NOLINTNEXTLINE(clang-analyzer-core.DivideZero)
    return std::int64_t(words * tokens_[stream / lanes_] / (all_ * lanes_));
  }
  // Bytes of counts of so many bits outside of the header.
  std::size_t section(int bits) const {
    const std::size_t bytes = (streams() * std::size_t(bits) + 7) / 8,
                      inside = kHeaderBytes - kCountsAt;
    return bytes > inside ? round16(bytes - inside) : 0;
  }

 private:
  std::vector<std::size_t> tokens_;
  std::size_t lanes_, all_ = 0;
};

// A block's header, and behind it the section of counts that does not fit there.
inline std::vector<std::uint8_t> pack_counts(const StreamTokens& streams,
                                             const std::vector<std::uint16_t>& counts,
                                             std::uint64_t words, RopeRounding rounding) {
  std::vector<std::int32_t> more(counts.size());
  for (std::size_t s = 0; s < more.size(); ++s)
    more[s] = std::int32_t(std::int64_t(counts[s]) - streams.share(s, words));
  const auto [low, high] = std::minmax_element(more.begin(), more.end());
  const std::int32_t least = more.empty() ? 0 : *low;
  int bits = 0;
  while (!more.empty() && (*high - least) >> bits) ++bits;
  std::vector<std::uint8_t> packed(kHeaderBytes + streams.section(bits));
  packed[0] = rounding == RopeRounding::none ? kPredicted : kUnturned;
  packed[1] = std::uint8_t(bits);
  packed[2] = std::uint8_t(rounding);
  std::memcpy(&packed[4], &least, sizeof least);
  std::size_t at = 8 * kCountsAt;
  for (const std::int32_t m : more)
    for (int b = 0; b < bits; ++b, ++at)
      packed[at / 8] |= std::uint8_t(((m - least) >> b & 1) << at % 8);
  return packed;
}

// The counts again, from a header and the sections that end the block, of which only the words are
// left. False when they do not fit.
inline bool unpack_counts(const StreamTokens& streams, const std::uint8_t* header,
                          Span<std::uint8_t>* data, std::vector<std::uint32_t>* counts) {
  const int bits = header[1];
  std::int32_t least;
  std::memcpy(&least, header + 4, sizeof least);
  const bool unturned = header[0] == kUnturned;
  if ((header[0] != kPredicted && !unturned) || bits > kMostCountBits || header[3]) return false;
  if (unturned ? !is_rope_rounding(header[2]) : header[2]) return false;
  const std::size_t section = streams.section(bits), inside = kHeaderBytes - kCountsAt;
  if (data->size < section || (data->size - section) % 4) return false;
  // In one piece, with room for a field that is read in whole bytes.
  std::vector<std::uint8_t> packed(inside + section + sizeof(std::uint32_t));
  std::copy_n(header + kCountsAt, inside, packed.data());
  std::copy_n(data->data, section, packed.data() + inside);
  data->data += section;
  data->size -= section;
  const std::uint64_t words = data->size / 4;
  std::uint64_t left = words;
  counts->resize(streams.streams());
  std::size_t at = 0;
  for (std::size_t s = 0; s < counts->size(); ++s, at += std::size_t(bits)) {
    std::uint32_t field;
    std::memcpy(&field, &packed[at / 8], sizeof field);
    field = field >> at % 8 & ((1u << bits) - 1);
    const std::int64_t count = streams.share(s, words) + least + field;
    if (count < 0 || std::uint64_t(count) > left) return false;
    (*counts)[s] = std::uint32_t(count);
    left -= std::uint64_t(count);
  }
  if (packed[at / 8] >> at % 8 || !all_zero(&packed[at / 8 + 1], packed.data() + packed.size()))
    return false;
  return !left && (!counts->empty() || (!bits && !least));
}

// States as they are stored: of each five bytes; of each, in two bits, how many more it has; these.
constexpr std::size_t kLeastStateBytes = 5;

inline std::vector<std::uint8_t> pack_states(const std::vector<std::uint64_t>& states) {
  const std::size_t n = states.size(), lengths = kLeastStateBytes * n;
  std::vector<std::uint8_t> packed(lengths + (n + 3) / 4);
  packed.reserve(round16(packed.size() + 3 * n));
  for (std::size_t i = 0; i < n; ++i) {
    std::memcpy(&packed[kLeastStateBytes * i], &states[i], kLeastStateBytes);
    std::uint8_t more = 0;
    for (std::uint64_t rest = states[i] >> 8 * kLeastStateBytes; rest; rest >>= 8, ++more)
      packed.push_back(std::uint8_t(rest));
    packed[lengths + i / 4] |= std::uint8_t(more << 2 * (i % 4));
  }
  packed.resize(round16(packed.size()));
  return packed;
}

// So many states again, from the sections of a block, of which those behind are left. False when
// they are none.
inline bool unpack_states(Span<std::uint8_t>* data, std::size_t n,
                          std::vector<std::uint64_t>* states) {
  const std::size_t fixed = kLeastStateBytes * n + (n + 3) / 4;
  if (data->size < fixed) return false;
  const std::uint8_t *const lengths = data->data + kLeastStateBytes * n, *const end = data->data +
                                                                                      data->size;
  const std::uint8_t* more = data->data + fixed;
  states->resize(n);
  for (std::size_t i = 0; i < n; ++i) {
    std::uint64_t x = 0;
    std::memcpy(&x, data->data + kLeastStateBytes * i, kLeastStateBytes);
    const std::size_t length = lengths[i / 4] >> 2 * (i % 4) & 3;
    if (std::size_t(end - more) < length) return false;
    for (std::size_t b = 0; b < length; ++b, ++more)
      x |= std::uint64_t(*more) << 8 * (kLeastStateBytes + b);
    if (x < kLow || x >> 63 || (length && !more[-1])) return false;
    (*states)[i] = x;
  }
  if (n % 4 && lengths[n / 4] >> 2 * (n % 4)) return false;
  const std::size_t used = std::size_t(more - data->data), all = round16(used);
  if (data->size < all || !all_zero(more, data->data + all)) return false;
  data->data += all;
  data->size -= all;
  return true;
}

}  // namespace kvzip::predictive
