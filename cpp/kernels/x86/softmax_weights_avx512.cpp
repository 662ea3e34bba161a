// Softmax weights for AVX-512: registers of sixteen floats.
#define AGQ_VECTOR 16
#define AGQ_TILE_COLUMNS 4
#include "kernels/portable/softmax_weights_impl.h"

namespace agq {

void softmax_weights_avx512(const softmax_weights_args &args) {
    softmax_weights(args);
}

}  // namespace agq
