#include "native/rotation_kernels.hpp"

namespace kvzip::rotation {
const Kernels avx2 = kernels_of<8>();
}
