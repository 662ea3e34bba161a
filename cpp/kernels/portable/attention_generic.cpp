// Attention for any CPU: vectors of four floats, which every supported architecture has.
#define AGQ_VECTOR 4
#define AGQ_TILE_COLUMNS 2
#include "kernels/portable/attention_impl.h"

namespace agq {

const few_kernel few_generic = AGQ_FEW_TABLE;
const attention_kernel attention_generic = AGQ_ATTENTION_TABLE(softmax_weights_generic, &few_generic);

}  // namespace agq
