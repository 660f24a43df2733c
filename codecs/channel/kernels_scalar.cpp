// For any processor.
#include "channel/isa_kernels.hpp"
#include "channel/scalar_steps.hpp"

namespace kvzip::channel {
KVZIP_KERNELS(scalar, ScalarSteps)
}
