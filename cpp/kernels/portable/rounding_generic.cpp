// Rounding kernels for any CPU.
#include "kernels/portable/rounding_impl.h"

namespace agq {

const rounding_kernel rounding_generic = AGQ_ROUNDING_TABLE;

}  // namespace agq
