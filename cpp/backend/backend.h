// The ggml backend "AGQ": registry, one device of type ACCEL on host memory, and the backend that runs whole graphs.
#pragma once

#include <string>

#include "base/environment.h"
#include "host/host.h"
#include "kernels/kernel.h"

namespace agq {

/// The registry to hand to the host. All computing goes through `kern`.
ggml_backend_reg *backend_registry(const kernel *kern, const options &chosen);

/// What contexts that this thread creates from now on shall do about pruning, in place of AGQ_PRUNE; null: back to
/// that. On a mistake returns false and `*error` says which.
bool set_thread_pruning(const char *text, std::string *error);

}  // namespace agq
