// The ggml backend "AGQ": registry, one device of type ACCEL on host memory, and the backend that runs whole graphs.
#pragma once

#include <string>

#include "base/environment.h"
#include "host/host.h"
#include "kernels/kernel.h"

namespace agq {

/// Creates the registry for the host. All products run with `kern`.
ggml_backend_reg *backend_registry(const kernel *kern, const options &chosen);

/// Checks an option before `set_context_option`. On an error returns false and sets `*error` to a message.
bool check_context_option(context_option which, const char *text, std::string *error);

}  // namespace agq
