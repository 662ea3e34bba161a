// Softmax weights for any processor: registers of four floats.
#define AGQ_VECTOR 4
#define AGQ_TILE_COLUMNS 2
#include "kernels/portable/softmax_weights_impl.h"

namespace agq {

void softmax_weights_generic(const softmax_weights_args &args) {
    softmax_weights(args);
}

}  // namespace agq
