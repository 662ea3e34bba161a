// Chooses the kernel at run time from one table, best first, scalar last.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace agq {

/// All kernels of this build, best first; the last one is scalar. This CPU may not support all of them.
const std::vector<const kernel *> &compiled_kernels();

/// The kernel to use: the one called `forced_name` (the value of AGQ_FORCE_ISA), or the best supported one if
/// `forced_name` is null or empty. There is no fallback for an unknown or unsupported name: the result is null, and
/// `error` (may be null) says what was asked for, which names are known and which are supported.
const kernel *select_kernel(const char *forced_name, std::string *error);

}  // namespace agq
