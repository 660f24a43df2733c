// Which instruction set's kernels run.
#include "channel/kernels.hpp"

#include "channel/isa_kernels.hpp"
#include "channel/strips.hpp"
#include "native/simd.hpp"

namespace kvzip::channel {

namespace {

// Strips of a stream, times lanes: enough that what it begins with is little, and few enough that a
// GPU has many of them. Numbers of a byte take less, so there are more of them.
std::size_t strips_of_lanes(const Tables& tables) {
  return tables.value_bits + tables.mantissa_bits == 8 ? 3072 : 2048;
}

}  // namespace

Streams::Streams(const Tables& tables, std::size_t batch, std::size_t tokens)
    : tables_(tables),
      tokens_(tokens),
      in_head_((tables.dim + kStrip - 1) / kStrip),
      in_row_(tables.heads * in_head_),
      in_group_(batch * in_row_),
      strips_(Strips(batch, tables.heads, tokens, tables.dim).count()) {
  if (!strips_) {
    count_ = 0;
    return;
  }
  const std::size_t each = strips_of_lanes(tables) / least(kLanes, tokens);
  count_ = (2 * strips_ + each) / (2 * each);  // the nearest, but one at least
  if (!count_) count_ = 1;
}

std::size_t Streams::lanes_at(std::size_t strip) const {
  return least(kLanes, tokens_ - strip / in_group_ * kLanes);
}

std::size_t Streams::mantissas_before(std::size_t strip) const {
  if (!strip) return 0;
  const std::size_t groups = strip / in_group_, rest = strip % in_group_;
  const std::size_t row = tables_.live[in_row_].before;
  const auto octets = [&](std::size_t first) {
    return (least(kLanes, tokens_ - least(first * kLanes, tokens_)) + 7) / 8;
  };
  std::size_t rows = octets(groups) * (rest / in_row_ * row + tables_.live[rest % in_row_].before);
  // Only the last group may be shorter.
  if (groups)
    rows += ((groups - 1) * (kLanes / 8) + octets(groups - 1)) * (in_group_ / in_row_) * row;
  return rows * std::size_t(rows_of_octet(tables_.mantissa_bits));
}

Stream Streams::operator[](std::size_t i) const {
  Stream s;
  s.first_strip = i * strips_ / count_;
  const std::size_t end = (i + 1) * strips_ / count_;
  s.strips = end - s.first_strip;
  s.lanes = lanes_at(s.first_strip);
  const std::size_t behind = mantissas_before(end);
  s.mantissas = behind - mantissas_before(s.first_strip);
  s.carried = least(s.lanes, (behind - mantissas_before(end - 1)) / 2);
  return s;
}

void make_decoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Decoder* decoder) {
#ifdef KVZIP_X86
  if (simd::vectors() == simd::Level::avx512 && width <= 32)
    return avx512::make_decoder(levels, width, escape_level, exponent_bits, decoder);
#endif
  make_decoder(make_alias(levels, width, escape_level, exponent_bits), decoder);
}

void make_encoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Encoder* encoder) {
  make_encoder(make_alias(levels, width, escape_level, exponent_bits), exponent_bits,
               simd::vectors(), encoder);
}

// What is read first of a stream comes from memory while the one before it is decoded.
static void fetch(const Coded& coded) {
  constexpr std::size_t kWordBytes = 2048;
  for (std::size_t at = 0; at < 3 * kLanes; at += 64) __builtin_prefetch(coded.states + at);
  for (std::size_t at = 0; at < kWordBytes; at += 64) __builtin_prefetch(coded.words + at);
}

template <typename T>
bool decode(const Tables& tables, const Block<T>& block, const Coded* streams, std::size_t count) {
  const auto kernel = [&] {
    switch (simd::vectors()) {
#ifdef KVZIP_X86
      case simd::Level::avx512: return avx512::decode<T>;
      // Sign and exponent of every value must fit a byte, as byte shuffles have them.
      case simd::Level::avx2: return tables.wide ? scalar::decode<T> : avx2::decode<T>;
#endif
#ifdef KVZIP_NEON
      case simd::Level::neon: return tables.wide ? scalar::decode<T> : neon::decode<T>;
#endif
      default: return scalar::decode<T>;
    }
  }();
  for (std::size_t i = 0; i < count; ++i) {
    if (i + 1 < count) fetch(streams[i + 1]);
    if (!kernel(tables, block, streams[i])) return false;
  }
  return true;
}

template <typename T>
bool encode(const Tables& tables, const Block<const T>& block, const Stream& stream, Sink* sink) {
  switch (simd::vectors()) {
#ifdef KVZIP_X86
    case simd::Level::avx512: return avx512::encode<T>(tables, block, stream, sink);
    case simd::Level::avx2: return avx2::encode<T>(tables, block, stream, sink);
#endif
#ifdef KVZIP_NEON
    case simd::Level::neon: return neon::encode<T>(tables, block, stream, sink);
#endif
    default: return scalar::encode<T>(tables, block, stream, sink);
  }
}

template bool decode(const Tables&, const Block<std::uint8_t>&, const Coded*, std::size_t);
template bool decode(const Tables&, const Block<std::uint16_t>&, const Coded*, std::size_t);
template bool decode(const Tables&, const Block<std::uint32_t>&, const Coded*, std::size_t);
template bool encode(const Tables&, const Block<const std::uint8_t>&, const Stream&, Sink*);
template bool encode(const Tables&, const Block<const std::uint16_t>&, const Stream&, Sink*);
template bool encode(const Tables&, const Block<const std::uint32_t>&, const Stream&, Sink*);

}  // namespace kvzip::channel
