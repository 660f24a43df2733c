// What a GPU's encoder looks up.
#pragma once

#include "channel/device_jobs.hpp"
#include "channel/kernels.hpp"

namespace kvzip::channel {

// Returns false for a shape of more than 32 exponents, which only a CPU encodes.
bool make_device_encoder(const Alias& alias, DeviceEncoder* out);

}  // namespace kvzip::channel
