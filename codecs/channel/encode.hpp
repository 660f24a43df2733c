// Encoding a stream, for any instruction set: the decoder's steps backwards. `Isa` has
//   EncoderLanes              the states of a group's lanes, and `step` for one channel of a tile
//   columns(rows, first, tile)  rows of 16 tokens as a tile's columns, in the order of EncoderLanes
//   collect                   bytes of the channels that are not constant
#pragma once

#include "channel/strips.hpp"

namespace kvzip::channel {
namespace {

// Mantissas of eight tokens.
template <class Isa, typename T, int M>
inline void split(const T (*numbers)[kStrip], std::uint64_t live, std::size_t live_count,
                  std::uint8_t* out) {
  constexpr int R = M % 8, B = M / 8;
  std::uint8_t all[rows_of_octet(M) * kStrip];
  std::uint8_t* const rows = live_count == kStrip ? out : all;
  for (int first = 0; first < kStrip; first += kVector) {
    // Byte `at` of a token's numbers.
    const auto byte = [&](int token, int at) {
      std::uint8_t bytes[kVector];
      for (int c = 0; c < kVector; ++c)
        bytes[c] = std::uint8_t(numbers[token][first + c] >> 8 * at);
      return vector_at(bytes);
    };
    const auto put = [&](int row, const Vector& bytes) {
      std::memcpy(rows + row * kStrip + first, &bytes, kVector);
    };
    Vector fields[8], packed[R];
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < B; ++j) put(8 * j + i, byte(i, j));
      fields[i] = byte(i, B) & std::uint8_t((1 << R) - 1);
    }
    pack<R>(fields, packed);
#pragma GCC unroll 7
    for (int j = 0; j < R; ++j) put(8 * B + j, packed[j]);
  }
  if (rows != out)
    for (int row = 0; row < rows_of_octet(M); ++row)
      Isa::collect(all + row * kStrip, live, live_count, out + std::size_t(row) * live_count);
}

// Compilers would copy 16 bytes at a time.
template <typename T>
inline void copy(const T* from, T (&row)[kStrip]) {
  constexpr int kNumbers = kVector / sizeof(T);
  for (int c = 0; c < kStrip; c += kNumbers) {
    Vector part;
    std::memcpy(&part, from + c, kVector);
    std::memcpy(row + c, &part, kVector);
  }
}

template <class Isa, typename T, int M>
bool encode_stream(const Tables& tables, const Block<const T>& block, const Stream& stream,
                   Sink* sink) {
  constexpr std::size_t kRows = rows_of_octet(M);
  typename Isa::EncoderLanes lanes;
  std::uint8_t* mantissas = sink->mantissas;
  Tile<T> tile;
  alignas(64) T rows[16][kStrip];
  const Strips strips(block.batch, tables.heads, block.tokens, tables.dim);
  const std::size_t end = stream.first_strip + stream.strips;
  for (std::size_t s = end; s-- > stream.first_strip;) {
    const Strip strip = strips[s];
    const Channel* channels = tables.channels + strip.head * tables.dim + strip.channel;
    const std::uint64_t live = strips.live(tables, strip);
    const auto live_count = std::size_t(__builtin_popcountll(live));
    const std::size_t octets = (strip.lanes + 7) / 8;
    mantissas -= octets * kRows * live_count;
    const T* corner = strip.corner(block);
    for (std::size_t o = 0; o < strip.lanes; o += 16) {
      const std::size_t there = least(16, strip.lanes - o);
      if (there < 16 || strip.width < kStrip) std::memset(rows, 0, sizeof rows);
      const T* const from = corner + std::ptrdiff_t(o) * block.token_stride;
      // Of fixed size where it can be: compilers make slow work of a few dozen bytes otherwise.
      if (strip.width == kStrip) {
        for (std::size_t i = 0; i < there; ++i)
          copy(from + std::ptrdiff_t(i) * block.token_stride, rows[i]);
      } else {
        for (std::size_t i = 0; i < there; ++i)
          std::memcpy(rows[i], from + std::ptrdiff_t(i) * block.token_stride,
                      strip.width * sizeof(T));
      }
      Isa::columns(rows, o, tile);
      for (std::size_t k = o / 8; k < least(o / 8 + 2, octets); ++k)
        split<Isa, T, M>(rows + 8 * (k - o / 8), live, live_count,
                         mantissas + k * kRows * live_count);
    }
    if (s + 1 == end) {
      const std::size_t words = stream.carried;
      const std::uint8_t* at = mantissas + octets * kRows * live_count - 2 * words;
      for (std::size_t j = 0; j < kLanes; ++j) {
        sink->states[j] = kLow;
        if (j < words) std::memcpy(&sink->states[j], at + 2 * j, 2);
      }
      lanes.load(sink->states);
    }
    // The next strip's numbers come from memory while this one's values are encoded.
    const Strip next = strips[s ? s - 1 : 0];
    const T* const next_corner = next.corner(block);
    for (std::size_t c = strip.width; c-- > 0;) {
      for (std::size_t j = 2 * c; j < least(2 * c + 2, next.lanes); ++j)
        for (std::size_t at = 0; at < kStrip; at += 64 / sizeof(T))
          __builtin_prefetch(next_corner + std::ptrdiff_t(j) * block.token_stride + at);
      if (live >> c & 1)
        if (!lanes.step(tables.encoders[channels[c].shape], channels[c].base, tables.value_bits,
                        tile.column(c), Tile<T>::template shift<M>(c), strip.lanes, sink))
          return false;
    }
  }
  lanes.store(sink->states);
  sink->mantissas = mantissas;
  return true;
}

}  // namespace
}  // namespace kvzip::channel
