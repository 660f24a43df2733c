#include "native/bf16_products_kernels.hpp"

namespace kvzip::bf16 {
constexpr Kernels avx2 = kernels_here;
}
