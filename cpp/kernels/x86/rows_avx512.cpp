// Row kernels for AVX-512.
#include "kernels/portable/rows_impl.h"

namespace agq {

const row_kernel rows_avx512 = AGQ_ROWS_TABLE;

}  // namespace agq
