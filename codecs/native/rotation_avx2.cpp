#include "native/rotation_kernels.hpp"

namespace kvzip::rotation {
constexpr Kernels avx2 = kernels_of<8>();
}
