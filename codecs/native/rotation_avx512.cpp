#include "native/rotation_kernels.hpp"

namespace kvzip::rotation {
const Kernels avx512 = kernels_of<16>();
}
