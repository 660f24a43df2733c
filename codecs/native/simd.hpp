// Which instructions the kernels use: chosen once, from what the processor has.
#pragma once

#include <stdexcept>

namespace kvzip::simd {

// `avx512` means F, BW, VL, DQ, VBMI, VBMI2, VNNI and VPOPCNTDQ (Ice Lake, Zen 4 and later), and
// all that `avx2` has; `neon` is what every 64-bit ARM processor has.
enum class Level { scalar, avx2, avx512, neon };
constexpr int kLevels = 4;

// The environment variable KVZIP_SIMD names none that this processor has.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The best this processor has, or the one that the environment variable KVZIP_SIMD names. Throws
// Unavailable.
Level level();

// For tests and comparisons; returns false when the processor does not have it.
bool set_level(Level level);

Level from_name(const char* name);  // throws std::invalid_argument
const char* name_of(Level level);

}  // namespace kvzip::simd
