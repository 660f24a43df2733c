// Which instructions the kernels use: chosen once, from what the processor has.
#pragma once

#include <stdexcept>

namespace kvzip::simd {

// `vnni` is `avx2` with products of bytes that are summed in 32 bits, in AVX's form (Alder Lake and
// later) or AVX-512's (Cascade Lake). `avx512` means F, BW, VL, DQ, VBMI, VBMI2, VNNI and VPOPCNTDQ
// (Ice Lake, Zen 4 and later), and all that `avx2` has; `amx` is that and AMX's products of bytes
// (Sapphire Rapids and later). `neon` is what every 64-bit ARM processor has.
enum class Level { scalar, avx2, vnni, avx512, amx, neon };
constexpr int kLevels = 6;

// The environment variable KVZIP_SIMD names none that this processor has.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The best this processor has, or the one that the environment variable KVZIP_SIMD names. Throws
// Unavailable.
Level level();

// `level()` for who multiplies no bytes: scalar, avx2, avx512 or neon.
Level vectors();

// Whether the system lets this process use AMX. It is asked once, by who is about to use it.
bool amx_is_allowed();

// Whether products of bytes have AVX's form.
bool has_avx_vnni();

// Whether a multiplication and an addition of fp32 can be one instruction, beside AVX2.
bool has_fma();

// Whether NEON has dot products of bytes (FEAT_DotProd), and products of matrices of them
// (FEAT_I8MM).
bool has_dotprod();
bool has_i8mm();

// For tests and comparisons; returns false when the processor does not have it.
bool set_level(Level level);

Level from_name(const char* name);  // throws std::invalid_argument
const char* name_of(Level level);

}  // namespace kvzip::simd
