// The kernels of each instruction set, and how kernels_*.cpp defines its own.
#pragma once

#include "channel/kernels.hpp"

#define KVZIP_DECLARE(level)                                                           \
  namespace level {                                                                    \
  template <typename T>                                                                \
  bool decode(const Tables& tables, const Block<T>& block, const Coded& coded);        \
  template <typename T>                                                                \
  bool encode(const Tables& tables, const Block<const T>& block, const Stream& stream, \
              Sink* sink);                                                             \
  }
namespace kvzip::channel {
KVZIP_DECLARE(scalar)
KVZIP_DECLARE(avx2)
KVZIP_DECLARE(avx512)
KVZIP_DECLARE(neon)
namespace avx512 {
// What this instruction set's kernels look up; `width` is at most 32.
void make_decoder(const std::uint8_t* levels, std::size_t width, std::uint8_t escape_level,
                  int exponent_bits, Decoder* decoder);
}  // namespace avx512
}  // namespace kvzip::channel
#undef KVZIP_DECLARE

// A number of so many bytes has one of these mantissas (spec.md); which one, the tables say.
#define KVZIP_KERNELS(level, Isa)                                                                \
  namespace level {                                                                              \
  template <typename T>                                                                          \
  bool decode(const Tables& tables, const Block<T>& block, const Coded& coded) {                 \
    if constexpr (sizeof(T) == 1)                                                                \
      return tables.mantissa_bits == 2 ? decode_stream<Isa, T, 2>(tables, block, coded)          \
                                       : decode_stream<Isa, T, 3>(tables, block, coded);         \
    else if constexpr (sizeof(T) == 2)                                                           \
      return tables.mantissa_bits == 7 ? decode_stream<Isa, T, 7>(tables, block, coded)          \
                                       : decode_stream<Isa, T, 10>(tables, block, coded);        \
    else return decode_stream<Isa, T, 23>(tables, block, coded);                                 \
  }                                                                                              \
  template <typename T>                                                                          \
  bool encode(const Tables& tables, const Block<const T>& block, const Stream& stream,           \
              Sink* sink) {                                                                      \
    if constexpr (sizeof(T) == 1)                                                                \
      return tables.mantissa_bits == 2 ? encode_stream<Isa, T, 2>(tables, block, stream, sink)   \
                                       : encode_stream<Isa, T, 3>(tables, block, stream, sink);  \
    else if constexpr (sizeof(T) == 2)                                                           \
      return tables.mantissa_bits == 7 ? encode_stream<Isa, T, 7>(tables, block, stream, sink)   \
                                       : encode_stream<Isa, T, 10>(tables, block, stream, sink); \
    else return encode_stream<Isa, T, 23>(tables, block, stream, sink);                          \
  }                                                                                              \
  template bool decode(const Tables&, const Block<std::uint8_t>&, const Coded&);                 \
  template bool decode(const Tables&, const Block<std::uint16_t>&, const Coded&);                \
  template bool decode(const Tables&, const Block<std::uint32_t>&, const Coded&);                \
  template bool encode(const Tables&, const Block<const std::uint8_t>&, const Stream&, Sink*);   \
  template bool encode(const Tables&, const Block<const std::uint16_t>&, const Stream&, Sink*);  \
  template bool encode(const Tables&, const Block<const std::uint32_t>&, const Stream&, Sink*);  \
  }
