// Attention for few rows with AVX-512: 6 x 4 vectors of sixteen floats are the accumulators.
#define AGQ_VECTOR 16
#define AGQ_TILE_COLUMNS 4
#include "kernels/portable/attention_few_impl.h"

namespace agq {

const few_kernel few_avx512 = AGQ_FEW_TABLE;

}  // namespace agq
