#include "channel/device_tables.hpp"

namespace kvzip::channel {

bool make_device_encoder(const Alias& alias, DeviceEncoder* out) {
  if (alias.width > kBuckets) return false;
  Encoder encoder;
  // What AVX2 looks up, in other words.
  make_encoder(alias, alias.exponent_bits, simd::Level::avx2, &encoder);
  for (std::uint32_t i = 0; i < kBuckets; ++i) {
    const auto symbol = [&](int sign) -> std::uint32_t {
      const std::uint8_t held = encoder.held[sign][i];
      return held & kHeld ? kBuckets | (held & (kBuckets - 1)) : 0;
    };
    out->map[i] = symbol(0) | symbol(1) << 8 | (encoder.before[i] + 1) << 16 | alias.escape << 24;
    const std::uint32_t start = encoder.start[0][i] | std::uint32_t(encoder.start[1][i]) << 8;
    out->symbol[i] = alias.freq[i] | start << kStartAt;
    out->inverse[i] = alias.freq[i] > 1 ? std::uint32_t((std::uint64_t(1) << 32) / alias.freq[i])
                                        : ~std::uint32_t(0);
    out->begins[i] = encoder.begins[i];
    out->shift[i] = encoder.shift[2 * i] | std::uint32_t(encoder.shift[2 * i + 1]) << 16;
  }
  return true;
}

}  // namespace kvzip::channel
