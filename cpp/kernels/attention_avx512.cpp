// Attention for AVX-512: 6 x 4 vectors of sixteen floats are the accumulators.
#define AGQ_VECTOR 16
#define AGQ_TILE_COLUMNS 4
#include <immintrin.h>

#include "attention_impl.h"

namespace agq {
namespace {

void f16_to_f32(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
    }
    for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

}  // namespace

const attention_kernel attention_avx512 = {attend, f16_to_f32};

}  // namespace agq
