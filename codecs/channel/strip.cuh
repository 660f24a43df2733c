// What decoding and encoding `channel` on a GPU share: the order of a block (spec.md), and what a
// warp knows of the strip that it codes.
#pragma once

#include "channel/device_jobs.hpp"
#include "native/cuda/device.cuh"
#include "native/cuda/place.cuh"

namespace kvzip::channel {

using cuda::kWarp;
using cuda::place_of;

constexpr unsigned kGroupTokens = 128, kStripWidth = 64;
constexpr unsigned kHalf = 32;  // channels that are decoded before they are written
constexpr unsigned kWarpsOfBlock =
    1;  // so that compilers see that a warp's threads go the same way
constexpr unsigned kMinState = 1u << 16;
constexpr unsigned kTopState = 1u << 24;  // from here on states are stored in four bytes
constexpr unsigned kUnrolled = 4;         // channels whose steps follow each other without a branch

constexpr unsigned rows_per_octet(int mantissa_bits) {
  return unsigned(8 * (mantissa_bits / 8) + mantissa_bits % 8);
}
// Bytes of so many states but for the highest ones.
KVZIP_DEVICE unsigned stored_states(unsigned lanes) { return 3 * lanes + (lanes + 7) / 8; }
KVZIP_DEVICE unsigned smaller(unsigned a, unsigned b) { return a < b ? a : b; }

// A group's tokens of one head's strip of channels, as strips.hpp has them.
struct DeviceStrip {
  unsigned batch, head, token, channel;  // the first; the token counted in the block
  unsigned lanes, width;

  KVZIP_DEVICE DeviceStrip(const DevicePart& part, unsigned tokens, unsigned i) {
    const unsigned row = (part.dim + kStripWidth - 1) / kStripWidth;
    channel = i % row * kStripWidth;
    i /= row;
    head = i % part.heads;
    i /= part.heads;
    batch = i % part.batch;
    token = i / part.batch * kGroupTokens;
    lanes = smaller(kGroupTokens, tokens - token);
    width = smaller(kStripWidth, part.dim - channel);
  }
};

// What a warp needs of a strip while it codes it.
struct StripView {
  const DevicePart* part;
  DeviceStrip strip;
  unsigned first_token;            // of the strip, counted in the part
  const unsigned char* mantissas;  // of the strip; set by whoever reads them
  unsigned live_low, live_high;    // channels that are not constant, a bit each
  int64_t corner;                  // of the strip's first channel, without the token's place
  DeviceChannel mine[2];           // of the lane's channel in each half

  // Strip `i` of a block of so many tokens, whose first is `block_token` of the part.
  KVZIP_DEVICE StripView(const DevicePart& of, unsigned block_token, unsigned tokens, unsigned i)
      : part(&of),
        strip(of, tokens, i),
        first_token(block_token + strip.token),
        mantissas(nullptr),
        corner(int64_t(strip.batch) * of.batch_stride + int64_t(strip.head) * of.head_stride +
               int64_t(strip.channel)) {
    const DeviceChannel* const channels =
        reinterpret_cast<const DeviceChannel*>(of.channels) + strip.head * of.dim + strip.channel;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mine[h] = {kConstantShape, 0};
      const unsigned channel = kHalf * unsigned(h) + cuda::thread() % kWarp;
      if (channel < strip.width) {
        const cuda::Two two =
            cuda::constant(reinterpret_cast<const cuda::Two*>(channels + channel));
        mine[h] = {two.v[0], two.v[1]};
      }
    }
    live_low = cuda::ballot(mine[0].shape != kConstantShape);
    live_high = cuda::ballot(mine[1].shape != kConstantShape);
  }

  // Whether every channel is coded and every token there, with rows and mantissas at multiples of
  // what is read and written at once.
  template <typename T>
  KVZIP_DEVICE bool is_whole(const unsigned char* at) const {
    constexpr int64_t kSize = int64_t(sizeof(T));
    const uint64_t places = part->numbers | uint64_t(corner * kSize) |
                            uint64_t(part->token_stride * kSize) |
                            (part->pages ? uint64_t(part->page_stride * kSize) : 0);
    return strip.lanes == kGroupTokens && (live_low & live_high) == ~0u &&
           reinterpret_cast<uint64_t>(at) % 8 == 0 && places % (sizeof(T) == 1 ? 8 : 16) == 0;
  }
  KVZIP_DEVICE unsigned live_count() const { return cuda::ones(live_low) + cuda::ones(live_high); }
  // How many channels before this one are not constant.
  KVZIP_DEVICE unsigned rank(unsigned channel) const {
    const unsigned below = (1u << (channel & 31)) - 1;
    return channel < 32 ? cuda::ones(live_low & below)
                        : cuda::ones(live_low) + cuda::ones(live_high & below);
  }
  KVZIP_DEVICE bool is_live(unsigned channel) const {
    return ((channel < 32 ? live_low : live_high) >> (channel & 31)) & 1;
  }
};

}  // namespace kvzip::channel

// All number formats: name, bits of exponent and of mantissa, and the type of their bits.
#define KVZIP_EACH_FORMAT(of)                                                  \
  of(bf16, 8, 7, uint16_t) of(fp16, 5, 10, uint16_t) of(fp32, 8, 23, uint32_t) \
      of(fp8_e4m3fn, 4, 3, uint8_t) of(fp8_e5m2, 5, 2, uint8_t)
