// Row kernels for any CPU.
#include "kernels/portable/rows_impl.h"

namespace agq {

const row_kernel rows_generic = AGQ_ROWS_TABLE;

}  // namespace agq
