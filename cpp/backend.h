// The ggml backend "AGQ": registry, one device of type ACCEL on host memory, and the backend that runs whole graphs.
#pragma once

#include <string>

#include "host.h"
#include "kernels/kernel.h"

namespace agq {

/// The registry to hand to the host. All computing goes through `kern`.
ggml_backend_reg *backend_registry(const kernel *kern);

}  // namespace agq
