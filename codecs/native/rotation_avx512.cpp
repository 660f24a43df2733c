#include "native/rotation_kernels.hpp"

namespace kvzip::rotation {
constexpr Kernels avx512 = kernels_of<16>();
}
