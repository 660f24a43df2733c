// The prefix codes of stored tables (spec.md, "Codes").
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvzip::channel {

constexpr int kCodes = 24, kMaxCode = 7;  // bits
constexpr int kWidthCode = 21, kEscapeCode = 22, kTopCode = 23;
constexpr int kDirect = 34;  // symbols that may have a code: 0 to 33
constexpr int kOtherBit = 1 << 15;
constexpr int kOther = kDirect;  // the code of all others; eight bits with the symbol follow

// Length of each symbol's code, '0' where it has none; the last is kOther's.
constexpr const char* kLengths[kCodes] = {
    "12344",
    "21344",
    "312455",
    "4312566",
    "5421366",
    "55312566",
    "4443135677",
    "223444555667777776",
    "6543333344566677777777",
    "432234555677",
    "765213577777",
    "77742136777",
    "7775421456777",
    "07765421457777",
    "007765421457777",
    "00776543223457777",
    "0007665432244566777776",
    "0000777553223456677777",
    "0000777664422345567777777",
    "00007777764332344566777777777",
    "000000077665443333445556667777",
    "077777764333334445677",
    "1233",
    "13254776",
};

// The code of a level below one of `above`, its own sign's, with `rest` left of 1024.
constexpr int level_code(int rest, int above) {
  if (rest < 64) return above < 6 ? above : 6;
  if (above < 2) return 7 + above;
  const int place = (rest / 64 + above - 3) / 2;
  return 9 + (place < 11 ? place : 11);
}

// What follows from the lengths. Codes are given out in order of length, then of symbol, as numbers
// whose first bit is read first; here that is the lowest.
struct Codes {
  std::uint8_t length[kCodes][kDirect + 1] = {};
  std::uint8_t bits[kCodes][kDirect + 1] = {};
  // Of the bits to come: symbol << 8 | length, kOtherBit with kOther's.
  std::uint16_t entry[kCodes][1 << kMaxCode] = {};

  constexpr Codes() {
    for (int c = 0; c < kCodes; ++c) {
      int n = 0;
      while (kLengths[c][n + 1]) ++n;
      for (int s = 0; s < n; ++s) length[c][s] = std::uint8_t(kLengths[c][s] - '0');
      length[c][kOther] = std::uint8_t(kLengths[c][n] - '0');
      unsigned next = 0;
      for (int l = 1; l <= kMaxCode; ++l, next <<= 1)
        for (int s = 0; s <= kDirect; ++s) {
          if (length[c][s] != l) continue;
          unsigned reversed = 0;
          for (int i = 0; i < l; ++i) reversed |= (next >> i & 1) << (l - 1 - i);
          ++next;
          bits[c][s] = std::uint8_t(reversed);
          for (unsigned x = reversed; x < 1u << kMaxCode; x += 1u << l)
            entry[c][x] = std::uint16_t((s == kOther ? kOtherBit : s << 8) | l);
        }
    }
  }

  // Bits of a symbol with its eight, if it has no code.
  constexpr int cost(int code, int s) const {
    return s < kDirect && length[code][s] ? length[code][s] : length[code][kOther] + 8;
  }
};
inline constexpr Codes kCodeTables{};

}  // namespace kvzip::channel
