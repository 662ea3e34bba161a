// Products with Q8_0 for the x86 kernels with 256-bit registers.
//
// The dot products of a block are a policy, because they are all that differs between AVX2 and AVX-VNNI:
//
//   struct policy {
//       struct weights;                                   32 signed weights
//       struct tokens;                                    32 activations of a token, to which 128 was added
//       static weights load_weights(const uint8_t *w);
//       static tokens load_tokens(const uint8_t *q);
//       static __m256i dot(weights w, tokens x);          8 integers whose sum is that of the 32 products
//   };
//
// Everything is in an anonymous namespace, because each kernel file is compiled with flags of its own.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels/portable/q8_loop.h"
#include "kernels/portable/unroll.h"

namespace agq {
namespace {

inline __m256 q8_weight_scale(const uint8_t *block) {
    uint16_t half;
    std::memcpy(&half, block, sizeof half);
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}

inline float q8_sum(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <class policy>
struct q8_tiles {
    static constexpr int most_tokens = 4;
    static constexpr int rows_for(int n) { return n == 1 ? 4 : 2; }

    template <int rows, int n>
    static void multiply(const q8_args &args, int64_t row, int64_t token) {
        const int64_t groups = args.k / (2 * q8_columns);
        const size_t row_bytes = static_cast<size_t>(groups) * 2 * q8_bytes, tile_bytes = rows * row_bytes;
        const size_t ahead = (q8_fetch_bytes + tile_bytes - 1) / tile_bytes * tile_bytes;
        const uint8_t *w = args.weights + row * row_bytes;
        const q8_group *x = args.tokens + token * groups;
        __m256 sums[rows][n];
        AGQ_UNROLL
        for (int r = 0; r < rows; r++) {
            AGQ_UNROLL
            for (int t = 0; t < n; t++) sums[r][t] = _mm256_setzero_ps();
        }
        for (int64_t g = 0; g < groups; g++, x++) {
            for (int b = 0; b < 2; b++, w += q8_bytes) {
                typename policy::weights weights[rows];
                __m256 scales[rows];
                AGQ_UNROLL
                for (int r = 0; r < rows; r++) {
                    const uint8_t *block = w + r * row_bytes;
                    _mm_prefetch(reinterpret_cast<const char *>(block + ahead), _MM_HINT_T1);
                    weights[r] = policy::load_weights(block + 2);
                    scales[r] = q8_weight_scale(block);
                }
                AGQ_UNROLL
                for (int t = 0; t < n; t++) {
                    const q8_group &group = x[t * groups];
                    const typename policy::tokens q = policy::load_tokens(group.q + b * q8_columns);
                    const __m256 scale = _mm256_load_ps(group.scale[b]);
                    AGQ_UNROLL
                    for (int r = 0; r < rows; r++) {
                        const __m256 products = _mm256_cvtepi32_ps(policy::dot(weights[r], q));
                        sums[r][t] = _mm256_fmadd_ps(products, _mm256_mul_ps(scales[r], scale), sums[r][t]);
                    }
                }
            }
        }
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            AGQ_UNROLL
            for (int r = 0; r < rows; r++) args.dst[token + t][row + r] = q8_sum(sums[r][t]);
        }
    }
};

}  // namespace
}  // namespace agq
