// Internal to attention_avx512vnni.cpp: converts queries, keys and values to 16-bit integers.
//
// Everything is in an anonymous namespace, because the one file that includes this is compiled with its own flags.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/x86/avx512_intrinsics.h"
// After the intrinsics:
#include "kernels/x86/attention_int16.h"

namespace agq {
namespace {

__mmask16 first_lanes(int n) {
    return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1 << n) - 1);
}

/// The largest magnitude of n floats: NaN if one is not finite, 0 if all are tiny.
float largest_of(const float *x, int n) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
        // Without the sign, the bits sort like the values, with NaN above all.
        const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(n - i), x + i);
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    const int top = _mm512_reduce_max_epi32(largest);
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
    __m512 squares = _mm512_setzero_ps();
    const __m512 inverse = _mm512_set1_ps(1.0f / amax);
    for (int i = 0; i < n; i += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i), inverse);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const float by_norm = norm_limit / std::sqrt(_mm512_reduce_add_ps(squares));
    const float limit = by_norm < element_limit ? by_norm : element_limit;
    const __m512 factor = _mm512_set1_ps(limit);
    for (int i = 0; i < 2 * pairs; i += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(n - i > 0 ? n - i : 0), x + i), inverse);
        const __m256i rounded = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor)));
        _mm256_mask_storeu_epi16(to + i, first_lanes(2 * pairs - i), rounded);
    }
    return amax / limit;
}

void pack_values(const float *rows, int n, int head_v, void *packed) {
    block_header *header = static_cast<block_header *>(packed);
    int32_t *to = reinterpret_cast<int32_t *>(header + 1);
    std::memset(header, 0, sizeof(*header));
    if (n < attention_keys) std::memset(to, 0, static_cast<size_t>(head_v) * 2 * attention_keys);
    for (int pair = 0; 2 * pair < n; ++pair, to += head_v) {
        __m512 factor[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        const float *x[2] = {rows + static_cast<int64_t>(2 * pair) * head_v, nullptr};
        x[1] = 2 * pair + 1 < n ? x[0] + head_v : x[0];  // multiplied by zero, if there is none
        for (int i = 0; i < 2 && 2 * pair + i < n; ++i) {
            const float amax = largest_of(x[i], head_v);
            if (std::isnan(amax)) header->bad |= uint64_t{1} << (2 * pair + i);
            if (!(amax > 0)) continue;
            header->scale[2 * pair + i] = amax / value_limit;
            factor[i] = _mm512_set1_ps(value_limit / amax);
        }
        for (int d = 0; d < head_v; d += 16) {
            __m512i rounded[2];
            for (int i = 0; i < 2; ++i) {
                // A vector that is not finite becomes zero, too.
                const __mmask16 used = _mm512_cmp_ps_mask(factor[i], _mm512_setzero_ps(), _CMP_NEQ_OQ);
                rounded[i] = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(used, _mm512_loadu_ps(x[i] + d), factor[i]));
            }
            const __m512i low = _mm512_and_si512(rounded[0], _mm512_set1_epi32(0xFFFF));
            _mm512_store_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(rounded[1], 16)));
        }
    }
}

void f16_to_f32(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = first_lanes(n - i < 16 ? static_cast<int>(n - i) : 16);
        _mm512_mask_storeu_ps(to + i, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from + i)));
    }
}

}  // namespace
}  // namespace agq
