// Each codec with compiled code adds its functions to the one module.
#pragma once

#include <nanobind/nanobind.h>

namespace kvzip {
void bind_output(nanobind::module_& m);
}
namespace kvzip::planes {
void bind(nanobind::module_& m);
}
namespace kvzip::channel {
void bind(nanobind::module_& m);
}
namespace kvzip::predictive {
void bind(nanobind::module_& m);
}
