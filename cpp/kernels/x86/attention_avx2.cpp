// Attention for AVX2 with FMA and F16C: 6 x 2 vectors of eight floats are the accumulators.
#define AGQ_VECTOR 8
#define AGQ_TILE_COLUMNS 2
#include "kernels/portable/attention_impl.h"

namespace agq {

const few_kernel few_avx2 = AGQ_FEW_TABLE;
const attention_kernel attention_avx2 = AGQ_ATTENTION_TABLE(softmax_weights_avx2, &few_avx2);

}  // namespace agq
