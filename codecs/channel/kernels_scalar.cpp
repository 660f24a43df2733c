// For any processor.
#include "channel/kernels_of.hpp"
#include "channel/scalar.hpp"

namespace kvzip::channel {
KVZIP_KERNELS(scalar, Scalar)
}
