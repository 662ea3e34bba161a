// Attention for AVX-512: 6 x 4 vectors of sixteen floats are the accumulators.
#define AGQ_VECTOR 16
#define AGQ_TILE_COLUMNS 4
#include "attention_impl.h"

namespace agq {

const attention_kernel attention_avx512 = {attend, f16_to_f32};

}  // namespace agq
