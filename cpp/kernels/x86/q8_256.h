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

#include "kernels/portable/unroll.h"
#include "kernels/q8.h"

namespace agq {
namespace {

constexpr int q8_most_tokens = 4;

/// Rows that are multiplied at a time.
constexpr int q8_rows_for(int n) {
    return n == 1 ? 4 : 2;
}

/// How far ahead to ask for weights, at least: as for AVX-512.
constexpr size_t q8_fetch_bytes = 16384;

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

/// dst[t][row + r] for r < rows and n tokens.
template <class policy, int rows, int n>
void q8_tile(const q8_args &args, int64_t row, int64_t token) {
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

/// Some rows times n tokens: the tile of most rows, and the tile of one for what is left.
template <class policy, int n>
void q8_multiply_tokens(const q8_args &args, int64_t row, int rows, int64_t token) {
    if (rows == q8_rows_for(n)) return q8_tile<policy, q8_rows_for(n), n>(args, row, token);
    for (int r = 0; r < rows; r++) q8_tile<policy, 1, n>(args, row + r, token);
}

template <class policy>
void q8_multiply(const q8_args &args) {
    constexpr decltype(&q8_multiply_tokens<policy, 1>) by_tokens[q8_most_tokens] = {
        q8_multiply_tokens<policy, 1>, q8_multiply_tokens<policy, 2>, q8_multiply_tokens<policy, 3>,
        q8_multiply_tokens<policy, 4>};
    const int step = q8_rows_for(args.n_tokens == 1 ? 1 : q8_most_tokens);
    for (int64_t row = 0; row < args.rows; row += step) {
        const int rows = static_cast<int>(args.rows - row < step ? args.rows - row : step);
        for (int64_t token = 0; token < args.n_tokens; token += q8_most_tokens) {
            const int64_t left = args.n_tokens - token;
            by_tokens[(left < q8_most_tokens ? left : q8_most_tokens) - 1](args, row, rows, token);
        }
    }
}

}  // namespace
}  // namespace agq
