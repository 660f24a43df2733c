// What encoding and decoding share, for any instruction set: the order of a block, the tile of
// values, the packing of mantissas. Everything lies in an unnamed namespace, because each
// kernels_*.cpp compiles it anew for its own instructions.
#pragma once

#include <cstring>

#include "channel/kernels.hpp"

namespace kvzip::channel {
namespace {

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// A group's tokens of one head's strip of channels.
struct Strip {
  std::size_t batch, head, token, channel;  // the first
  std::size_t lanes, width;                 // how many tokens and channels

  template <typename T>
  T* corner(const Block<T>& block) const {
    return block.data + std::ptrdiff_t(batch) * block.batch_stride +
           std::ptrdiff_t(head) * block.head_stride + std::ptrdiff_t(token) * block.token_stride +
           std::ptrdiff_t(channel);
  }
};

// All strips of a block, in the order of the format.
class Strips {
 public:
  Strips(std::size_t batch, std::size_t heads, std::size_t tokens, std::size_t dim)
      : batch_(batch),
        heads_(heads),
        tokens_(tokens),
        dim_(dim),
        row_((dim + kStrip - 1) / kStrip) {}

  std::size_t count() const { return (tokens_ + kLanes - 1) / kLanes * batch_ * heads_ * row_; }

  Strip operator[](std::size_t i) const {
    Strip s;
    s.channel = i % row_ * kStrip;
    i /= row_;
    s.head = i % heads_;
    i /= heads_;
    s.batch = i % batch_;
    s.token = i / batch_ * kLanes;
    s.lanes = least(kLanes, tokens_ - s.token);
    s.width = least(kStrip, dim_ - s.channel);
    return s;
  }

  // A bit for each of its channels that is not constant.
  std::uint64_t live(const Tables& tables, const Strip& strip) const {
    return tables.live[strip.head * row_ + strip.channel / kStrip].channels;
  }

 private:
  std::size_t batch_, heads_, tokens_, dim_, row_;
};

// Numbers of a strip as words of 32 bits, [kStrip / numbers in a word][lanes]: turned to rows they
// are the numbers as they lie in memory.
template <typename T>
struct Tile {
  static constexpr int kInWord = 4 / sizeof(T);
  static constexpr int kWords = kStrip / kInWord;
  alignas(64) std::uint32_t word[kWords][kLanes];

  static constexpr bool kWhole = true;

  std::uint32_t* column(std::size_t channel) { return word[channel / kInWord]; }
  void put(std::size_t channel, std::size_t lane, T number) {
    std::memcpy(reinterpret_cast<T*>(column(channel) + lane) + channel % kInWord, &number,
                sizeof number);
  }
  // Where a channel's value lies in a word, above its mantissa of M bits.
  template <int M>
  static constexpr int shift(std::size_t channel) {
    return int(channel % kInWord * 8 * sizeof(T)) + M;
  }
};

// --- mantissas -------------------------------------------------------------------------------
// The low 8*(M/8) bits go as whole bytes, the M%8 bits above them packed over eight tokens.

constexpr int rows_of_octet(int mantissa_bits) {
  return 8 * (mantissa_bits / 8) + mantissa_bits % 8;
}

// Bytes of channels, as many as the instruction set's vectors hold: wider ones go through memory.
#if defined(__AVX512BW__)
constexpr int kVector = 64;
#elif defined(__AVX2__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
typedef std::uint8_t Vector __attribute__((vector_size(kVector)));
typedef std::uint16_t Vector16 __attribute__((vector_size(kVector)));

inline Vector vector_at(const std::uint8_t* p) {
  Vector v;
  std::memcpy(&v, p, kVector);
  return v;
}
// Shifts do not cross from byte to byte where the mask says so.
inline Vector up(Vector r, int bits, int mask) {
  return Vector(Vector16(r) << bits) & (Vector{} + std::uint8_t(mask));
}
inline Vector down(Vector r, int bits, int mask) {
  return Vector(Vector16(r) >> bits) & (Vector{} + std::uint8_t(mask));
}

// Fields of R bits of eight tokens into R rows, and back.
template <int R>
inline void pack(const Vector f[8], Vector row[R]) {
  static_assert(R == 2 || R == 3 || R == 7, "a field width of one of the formats");
  if constexpr (R == 7) {
    for (int j = 0; j < 7; ++j) row[j] = f[j] | up(f[7], 7 - j, 0x80);
  } else if constexpr (R == 3) {
    const Vector rest = f[6] | up(f[7], 3, 0x38);
    for (int j = 0; j < 3; ++j)
      row[j] = f[2 * j] | up(f[2 * j + 1], 3, 0x38) | up(down(rest, 2 * j, 3), 6, 0xC0);
  } else {
    for (int j = 0; j < 2; ++j)
      row[j] = f[4 * j] | up(f[4 * j + 1], 2, 0x0C) | up(f[4 * j + 2], 4, 0x30) |
               up(f[4 * j + 3], 6, 0xC0);
  }
}

template <int R>
inline void unpack(const Vector row[R], Vector f[8]) {
  if constexpr (R == 7) {
    f[7] = Vector{};
    for (int j = 0; j < 7; ++j) {
      f[j] = row[j] & 0x7F;
      f[7] |= down(row[j], 7 - j, 1 << j);
    }
  } else if constexpr (R == 3) {
    Vector rest{};
    for (int j = 0; j < 3; ++j) {
      f[2 * j] = row[j] & 7;
      f[2 * j + 1] = down(row[j], 3, 7);
      rest |= up(down(row[j], 6, 3), 2 * j, 3 << 2 * j);
    }
    f[6] = rest & 7;
    f[7] = down(rest, 3, 7);
  } else {
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) f[4 * j + i] = down(row[j], 2 * i, 3);
  }
}

// The same of a strip's rows.
template <int R>
inline void unpack(const std::uint8_t* rows, std::uint8_t (*fields)[kStrip]) {
  for (int c = 0; c < kStrip; c += kVector) {
    Vector row[R], f[8];
    for (int j = 0; j < R; ++j) row[j] = vector_at(rows + j * kStrip + c);
    unpack<R>(row, f);
    for (int i = 0; i < 8; ++i) std::memcpy(fields[i] + c, &f[i], kVector);
  }
}

}  // namespace
}  // namespace kvzip::channel
