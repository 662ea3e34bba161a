// Rounding kernels for AVX2.
#include "kernels/portable/rounding_impl.h"

namespace agq {

const rounding_kernel rounding_avx2 = AGQ_ROUNDING_TABLE;

}  // namespace agq
