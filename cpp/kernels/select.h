// The choice of the kernel at run time: one table, best first, scalar last.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel.h"

namespace agq {

/// All kernels of this build, best first; the last one is scalar. Not all of them need run on this CPU.
const std::vector<const kernel *> &compiled_kernels();

/// The kernel to use: the one called `forced_name` (the value of AGQ_FORCE_ISA), or the best supported one if
/// `forced_name` is null or empty. A name that is unknown, or that this CPU cannot run, is never replaced by another
/// kernel: the result is null and `error` (which may be null) says what was asked for, what is known and what would
/// work.
const kernel *select_kernel(const char *forced_name, std::string *error);

}  // namespace agq
