// Products with Q8_0, for AVX-512 with VNNI: VPDPBUSD multiplies 64 unsigned activations by 64 signed weights. 128
// times the sum of the weights is subtracted beforehand, because 128 was added to the activations.
#include <cstring>

#include "kernels/isa.h"
#include "kernels/portable/q8_loop.h"
#include "kernels/portable/unroll.h"
#include "kernels/x86/avx512_intrinsics.h"

namespace agq {
namespace {

/// Two blocks of a row: 64 weights, their scales, and -128 times the sums of four weights.
struct pair {
    __m512i w, start;
    __m512 scale;
};

AGQ_INLINE pair load_pair(const uint8_t *blocks) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(blocks + 2)),
                  second = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(blocks + q8_bytes + 2));
    const __m512i w = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), w);
    uint16_t halves[2];
    std::memcpy(halves, blocks, 2);
    std::memcpy(halves + 1, blocks + q8_bytes, 2);
    const __m128 scales = _mm_cvtph_ps(_mm_cvtsi32_si128(halves[0] | halves[1] << 16));
    const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return {w, _mm512_sub_epi32(_mm512_setzero_si512(), sums),
            _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(scales))};
}

struct tiles {
    static constexpr int most_tokens = 8;
    static constexpr int rows_for(int n) { return n <= 4 ? 4 : 2; }

    template <int rows, int n>
    static void multiply(const q8_args &args, int64_t row, int64_t token) {
        const int64_t groups = args.k / (2 * q8_columns);
        const size_t row_bytes = static_cast<size_t>(groups) * 2 * q8_bytes;
        const uint8_t *w = args.weights + row * row_bytes;
        const size_t tile_bytes = rows * row_bytes, ahead = (q8_fetch_bytes + tile_bytes - 1) / tile_bytes * tile_bytes;
        const q8_group *x = args.tokens + token * groups;
        __m512 sums[rows][n];
        AGQ_UNROLL
        for (int r = 0; r < rows; r++) {
            AGQ_UNROLL
            for (int t = 0; t < n; t++) sums[r][t] = _mm512_setzero_ps();
        }
        for (int64_t g = 0; g < groups; g++, w += 2 * q8_bytes, x++) {
            pair p[rows];
            AGQ_UNROLL
            for (int r = 0; r < rows; r++) {
                const uint8_t *blocks = w + r * row_bytes;
                // Two, because blocks are longer than half a cache line.
                _mm_prefetch(reinterpret_cast<const char *>(blocks + ahead), _MM_HINT_T1);
                _mm_prefetch(reinterpret_cast<const char *>(blocks + ahead + q8_bytes), _MM_HINT_T1);
                p[r] = load_pair(blocks);
            }
            AGQ_UNROLL
            for (int t = 0; t < n; t++) {
                const __m512i q = _mm512_load_si512(x[t * groups].q);
                const __m512 scale = _mm512_load_ps(x[t * groups].scale[0]);
                AGQ_UNROLL
                for (int r = 0; r < rows; r++) {
                    const __m512 products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(p[r].start, q, p[r].w));
                    sums[r][t] = _mm512_fmadd_ps(products, _mm512_mul_ps(p[r].scale, scale), sums[r][t]);
                }
            }
        }
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            AGQ_UNROLL
            for (int r = 0; r < rows; r++) args.dst[token + t][row + r] = _mm512_reduce_add_ps(sums[r][t]);
        }
    }
};

}  // namespace

namespace isa::avx512vnni {

const q8_kernel q8 = {q8_pack, q8_multiply<tiles>};

}  // namespace isa::avx512vnni
}  // namespace agq
