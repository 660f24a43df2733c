#include "channel/kernels_of.hpp"
#include "channel/scalar.hpp"

namespace kvzip::channel {
namespace { struct Avx2 : Scalar {}; }
KVZIP_KERNELS(avx2, Avx2)
}
