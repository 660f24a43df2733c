// Which instruction set's kernels run.
#include "channel/kernels.hpp"

#include "channel/kernels_of.hpp"
#include "channel/strips.hpp"
#include "native/simd.hpp"

namespace kvzip::channel {

std::size_t mantissa_bytes(const Tables& tables, std::size_t batch, std::size_t tokens) {
  std::size_t live = 0;
  for (std::size_t c = 0; c < tables.heads * tables.dim; ++c) live += !tables.channels[c].constant;
  return batch * ((tokens + 7) / 8) * std::size_t(rows_of_octet(tables.mantissa_bits)) * live -
         2 * carried_words(tables, tokens) * (batch > 0);
}

void make_decoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Decoder* decoder) {
#ifdef KVZIP_X86
  if (simd::level() == simd::Level::avx512 && width <= 32)
    return avx512::make_decoder(levels, width, escape_level, exponent_bits, decoder);
#endif
  make_decoder(make_alias(levels, width, escape_level, exponent_bits), decoder);
}

void make_encoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Encoder* encoder) {
  make_encoder(make_alias(levels, width, escape_level, exponent_bits), exponent_bits, simd::level(),
               encoder);
}

// Whether sign and exponent of every value fit a byte, as byte shuffles have them.
[[maybe_unused]] static bool narrow(const Tables& tables) {
  bool wide = false;
  for (std::size_t c = 0; c < tables.heads * tables.dim; ++c) {
    const Channel& channel = tables.channels[c];
    wide |= !channel.constant && tables.decoders[channel.shape].wide;
  }
  return !wide;
}

template <typename T>
bool decode(const Tables& tables, const Block<T>& block, const Coded& coded) {
  switch (simd::level()) {
#ifdef KVZIP_X86
    case simd::Level::avx512: return avx512::decode<T>(tables, block, coded);
    case simd::Level::avx2:
      return narrow(tables) ? avx2::decode<T>(tables, block, coded)
                            : scalar::decode<T>(tables, block, coded);
#endif
#ifdef KVZIP_NEON
    case simd::Level::neon:
      return narrow(tables) ? neon::decode<T>(tables, block, coded)
                            : scalar::decode<T>(tables, block, coded);
#endif
    default: return scalar::decode<T>(tables, block, coded);
  }
}

template <typename T>
bool encode(const Tables& tables, const Block<const T>& block, Sink* sink) {
  switch (simd::level()) {
#ifdef KVZIP_X86
    case simd::Level::avx512: return avx512::encode<T>(tables, block, sink);
    case simd::Level::avx2: return avx2::encode<T>(tables, block, sink);
#endif
#ifdef KVZIP_NEON
    case simd::Level::neon: return neon::encode<T>(tables, block, sink);
#endif
    default: return scalar::encode<T>(tables, block, sink);
  }
}

template bool decode(const Tables&, const Block<std::uint8_t>&, const Coded&);
template bool decode(const Tables&, const Block<std::uint16_t>&, const Coded&);
template bool decode(const Tables&, const Block<std::uint32_t>&, const Coded&);
template bool encode(const Tables&, const Block<const std::uint8_t>&, Sink*);
template bool encode(const Tables&, const Block<const std::uint16_t>&, Sink*);
template bool encode(const Tables&, const Block<const std::uint32_t>&, Sink*);

}  // namespace kvzip::channel
