// Attention for any CPU: vectors of four floats, which every supported architecture has.
#define AGQ_VECTOR 4
#define AGQ_TILE_COLUMNS 2
#include "attention_impl.h"

namespace agq {
namespace {

void f16_to_f32(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(from[i]);
}

}  // namespace

const attention_kernel attention_generic = {attend, f16_to_f32};

}  // namespace agq
