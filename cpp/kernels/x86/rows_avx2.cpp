// Row kernels for AVX2.
#include "kernels/portable/rows_impl.h"

namespace agq {

const row_kernel rows_avx2 = AGQ_ROWS_TABLE;

}  // namespace agq
