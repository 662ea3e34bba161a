// Rounding kernels for AVX-512.
#include "kernels/portable/rounding_impl.h"

namespace agq {

const rounding_kernel rounding_avx512 = AGQ_ROUNDING_TABLE;

}  // namespace agq
