// Internal to attention_256.cpp: converts queries, keys and values to 16-bit integers.
//
// Everything is in an anonymous namespace, because the one file that includes this is compiled with its own flags.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>
// After the intrinsics:
#include "kernels/x86/attention_int16.h"

namespace agq {
namespace {

/// All bits of the first n lanes; n may be negative, or more than 8.
inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/// The first n of eight floats; the other lanes are 0.
inline __m256 load_first(const float *x, int n) {
    return n >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_lanes(n));
}

/// The largest magnitude of n floats: NaN if one is not finite, 0 if all are tiny.
inline float largest_of(const float *x, int n) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) {
        // Without the sign, the bits sort like the values, with NaN above all.
        const __m256i bits = _mm256_castps_si256(load_first(x + i, n - i));
        largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), largest);
    int32_t top = 0;
    for (const int32_t lane : lanes) top = lane > top ? lane : top;
    float amax;
    std::memcpy(&amax, &top, sizeof amax);
    if (top >= 0x7F800000) return NAN;
    return amax < 0x1p-100f ? 0.0f : amax;
}

float quantize_vector(const float *x, int n, int pairs, int16_t *to) {
    const float amax = largest_of(x, n);
    if (!(amax > 0)) {
        std::memset(to, 0, static_cast<size_t>(pairs) * 4);
        return amax;
    }
    __m256 squares = _mm256_setzero_ps();
    const __m256 inverse = _mm256_set1_ps(1.0f / amax);
    for (int i = 0; i < n; i += 8) {
        const __m256 v = _mm256_mul_ps(load_first(x + i, n - i), inverse);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, squares);
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    const float by_norm = norm_limit / std::sqrt(sum);
    const float limit = by_norm < element_limit ? by_norm : element_limit;
    const __m256 factor = _mm256_set1_ps(limit);
    for (int i = 0; i < 2 * pairs; i += 8) {
        const __m256 v = _mm256_mul_ps(_mm256_mul_ps(load_first(x + i, n - i), inverse), factor);
        const __m256i rounded = _mm256_cvtps_epi32(v);
        const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        const int left = 2 * pairs - i;
        if (left >= 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), narrow);
        } else {
            std::memcpy(to + i, &narrow, static_cast<size_t>(left) * 2);
        }
    }
    return amax / limit;
}

void pack_values(const float *rows, int n, int head_v, void *packed) {
    block_header *header = static_cast<block_header *>(packed);
    int32_t *to = reinterpret_cast<int32_t *>(header + 1);
    std::memset(header, 0, sizeof(*header));
    if (n < attention_keys) std::memset(to, 0, static_cast<size_t>(head_v) * 2 * attention_keys);
    for (int pair = 0; 2 * pair < n; ++pair, to += head_v) {
        // A vector that is not there, is tiny or is not finite becomes zeros.
        float factor[2] = {0, 0};
        const float *x[2] = {rows + static_cast<int64_t>(2 * pair) * head_v, nullptr};
        x[1] = 2 * pair + 1 < n ? x[0] + head_v : x[0];
        for (int i = 0; i < 2 && 2 * pair + i < n; ++i) {
            const float amax = largest_of(x[i], head_v);
            if (std::isnan(amax)) header->bad |= uint64_t{1} << (2 * pair + i);
            if (!(amax > 0)) continue;
            header->scale[2 * pair + i] = amax / value_limit;
            factor[i] = value_limit / amax;
        }
        for (int d = 0; d < head_v; d += 8) {
            __m256i rounded[2];
            for (int i = 0; i < 2; ++i) {
                rounded[i] =
                    factor[i] == 0
                        ? _mm256_setzero_si256()
                        : _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x[i] + d), _mm256_set1_ps(factor[i])));
            }
            const __m256i low = _mm256_and_si256(rounded[0], _mm256_set1_epi32(0xFFFF));
            _mm256_store_si256(reinterpret_cast<__m256i *>(to + d),
                               _mm256_or_si256(low, _mm256_slli_epi32(rounded[1], 16)));
        }
    }
}

}  // namespace
}  // namespace agq
