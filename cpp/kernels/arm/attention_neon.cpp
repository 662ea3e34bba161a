// Attention for 64-bit Arm: 6 x 4 vectors of four floats are the accumulators, of 32 registers.
#define AGQ_VECTOR 4
#define AGQ_TILE_COLUMNS 4
#include "kernels/portable/attention_impl.h"

namespace agq {

const few_kernel few_neon = AGQ_FEW_TABLE;
const attention_kernel attention_neon = AGQ_ATTENTION_TABLE(softmax_weights_generic, &few_neon);

}  // namespace agq
