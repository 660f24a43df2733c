#include "predictive/kernels.hpp"

#include "native/simd.hpp"

#include <algorithm>

namespace kvzip::predictive {

const Kernels& kernels() {
#ifdef KVZIP_X86
  if (simd::level() == simd::Level::avx512) return avx512_kernels();
  if (simd::level() == simd::Level::avx2) return avx2_kernels();
#endif
  return scalar_kernels();
}

std::size_t encode(const Tokens& tokens, std::size_t channels, Intervals intervals,
                   std::uint32_t* words_end, std::uint64_t* states) {
  std::uint32_t* word = words_end;
  std::fill(states, states + kLanes, kLow);
  std::size_t at = tokens.rows * tokens.count * channels;
  for (std::size_t i = tokens.tiles; i-- > 0;) {
    const std::size_t n = tokens.tile[i].count;
    for (std::size_t c = 0; c < channels; ++c) {
      at -= n;
      for (std::size_t t = n; t-- > 0;) {
        const std::uint64_t size = intervals.size[at + t];
        std::uint64_t x = states[t % kLanes];
        const bool full = x >= size << 39;
        word[-1] = std::uint32_t(x);
        word -= full;
        x = full ? x >> 32 : x;
        states[t % kLanes] = (x / size << kCdfBits) + x % size + intervals.start[at + t];
      }
    }
  }
  return std::size_t(words_end - word);
}

}  // namespace kvzip::predictive
