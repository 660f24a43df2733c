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

std::size_t encode(const Part& part, Form form, std::size_t group, std::size_t lanes,
                   const std::uint32_t* at, const Tile* tile, std::size_t tiles,
                   Intervals intervals, std::uint64_t* state, std::uint16_t* counts,
                   std::uint32_t* words_end) {
  const std::size_t channels = part.channels();
  std::uint32_t* word = words_end;
  for (std::size_t i = tiles; i-- > 0;) {
    const Tile& t = tile[i];
    const std::uint32_t *const start = intervals.start + t.start * channels, *const size =
                                                                                 intervals.size +
                                                                                 t.start * channels;
    for (std::size_t half = t.streams(); half-- > 0;) {
      const std::size_t first = half * kStream,
                        tokens = std::min<std::size_t>(kStream, t.count - first);
      for (std::size_t lane = lanes; lane-- > 0;) {
        const std::uint32_t* const begin = word;
        std::uint64_t x[kStream];
        for (std::size_t k = 0; k < tokens; ++k)
          x[k] = state[at[t.start + first + k] * lanes + lane];
        const auto put = [&](std::uint64_t& state_of, std::uint64_t from, std::uint64_t share) {
          std::uint64_t y = state_of;
          const bool full = y >= share << 39;
          word[-1] = std::uint32_t(y);
          word -= full;
          y = full ? y >> 32 : y;
          state_of = (y / share << kCdfBits) + y % share + from;
        };
        const int spare = kCdfBits - form.bits();
        const auto channel = [&](std::size_t place) {
          const std::size_t n = place * t.count + first;
          bool escapes = false;
          for (std::size_t k = 0; k < tokens; ++k) escapes |= size[n + k] == 0;
          if (escapes)
            for (std::size_t k = tokens; k-- > 0;)
              if (!size[n + k])
                put(x[k], std::uint64_t(start[n + k]) << spare, std::uint64_t(1) << spare);
          for (std::size_t k = tokens; k-- > 0;)
            size[n + k] ? put(x[k], start[n + k], size[n + k]) : put(x[k], kCdf - kEscape, kEscape);
        };
        for (std::size_t g = (channels + group - 1) / group; g-- > 0;) {
          const std::size_t from = g * group, pairs = (std::min(group, channels - from) + 1) / 2;
          if (pairs <= lane) continue;
          for (std::size_t p = lane + (pairs - 1 - lane) / lanes * lanes;; p -= lanes) {
            if (from + 2 * p + 1 < channels) channel(from + 2 * p + 1);
            channel(from + 2 * p);
            if (p == lane) break;
          }
        }
        for (std::size_t k = 0; k < tokens; ++k)
          state[at[t.start + first + k] * lanes + lane] = x[k];
        counts[(t.stream + half) * lanes + lane] = std::uint16_t(begin - word);
      }
    }
  }
  return std::size_t(words_end - word);
}

}  // namespace kvzip::predictive
