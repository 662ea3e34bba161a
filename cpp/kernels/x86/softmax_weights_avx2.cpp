// Softmax weights for AVX2 with FMA and F16C: registers of eight floats.
#define AGQ_VECTOR 8
#define AGQ_TILE_COLUMNS 2
#include "kernels/portable/softmax_weights_impl.h"

namespace agq {

void softmax_weights_avx2(const softmax_weights_args &args) {
    softmax_weights(args);
}

}  // namespace agq
