// Internal to attention_avx512vnni.cpp: how queries, keys and values are converted to 16-bit integers, and their
// layout.
//
// A query or key vector is converted to integers with one scale, so that its Euclidean norm stays below 46000. By the
// Cauchy-Schwarz inequality all products then fit 32 bits. A vector of 64 ordinary values keeps 14 bits. The values of
// 64 keys keep 14 bits of the largest one in the channel. Keys and values in the cache have 11 bits.
//
// Everything is in an anonymous namespace, because the one file that includes this is compiled with its own flags.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/attention.h"
#include "kernels/x86/avx512_intrinsics.h"

namespace agq {
namespace {

constexpr float norm_limit = 46000.0f, element_limit = 32767.0f;
constexpr float value_limit = 16383.0f;

/// Begins a packed block of keys. Then follows [head_qk / 2, rounded up][64 keys][2 channels] int16.
struct key_header {
    float scale[attention_keys];
    uint64_t bad;  ///< bit i: key i is not finite, and stored as zeros
    char filler[56];
};

/// Begins a packed block of values. Then follow float scale[head_v] and int16 [32 pairs of keys][head_v][2 keys].
struct value_header {
    uint64_t bad;
    char filler[56];
};

constexpr size_t round_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

int channel_pairs(int head_qk) {
    return (head_qk + 1) / 2;
}

size_t key_bytes(int head_qk) {
    return sizeof(key_header) + static_cast<size_t>(channel_pairs(head_qk)) * attention_keys * 4;
}

size_t value_bytes(int head_v) {
    return sizeof(value_header) + static_cast<size_t>(head_v) * (sizeof(float) + 2 * attention_keys);
}

__mmask16 first_lanes(int n) {
    return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1 << n) - 1);
}

/// Writes n floats as 16-bit integers, padded to `pairs` pairs, and returns their scale. If a float is not finite,
/// returns NaN and writes zeros.
float quantize_vector(const float *x, int n, int pairs, int16_t *to) {
    __m512i largest = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
        // Without the sign, the bits sort like the values, with NaN above all.
        const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(n - i), x + i);
        largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)));
    }
    const int top = _mm512_reduce_max_epi32(largest);
    float amax;
    std::memcpy(&amax, &top, sizeof amax);
    if (top >= 0x7F800000 || amax < 0x1p-100f) {
        std::memset(to, 0, static_cast<size_t>(pairs) * 4);
        return amax < 0x1p-100f ? 0.0f : NAN;
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

void pack_keys(const float *rows, int n, int head_qk, void *packed) {
    key_header *header = static_cast<key_header *>(packed);
    int32_t *to = reinterpret_cast<int32_t *>(header + 1);
    const int pairs = channel_pairs(head_qk);
    std::memset(header, 0, sizeof(*header));
    if (n < attention_keys) std::memset(to, 0, static_cast<size_t>(pairs) * attention_keys * 4);
    alignas(64) int32_t key[attention_head_limit / 2];
    for (int i = 0; i < n; ++i) {
        const float *x = rows + static_cast<int64_t>(i) * head_qk;
        const float scale = quantize_vector(x, head_qk, pairs, reinterpret_cast<int16_t *>(key));
        if (std::isnan(scale)) {
            header->bad |= uint64_t{1} << i;
        } else {
            header->scale[i] = scale;
        }
        for (int d = 0; d < pairs; ++d) to[d * attention_keys + i] = key[d];
    }
}

void pack_values(const float *rows, int n, int head_v, void *packed) {
    value_header *header = static_cast<value_header *>(packed);
    float *scales = reinterpret_cast<float *>(header + 1);
    int32_t *to = reinterpret_cast<int32_t *>(scales + head_v);
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    std::memset(header, 0, sizeof(*header));
    for (int i = 0; i < n; ++i) {
        __mmask16 infinite = 0;
        for (int d = 0; d < head_v; d += 16) {
            const __m512i bits =
                _mm512_and_si512(_mm512_loadu_si512(rows + static_cast<int64_t>(i) * head_v + d), magnitude);
            infinite |= _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
        }
        if (infinite) header->bad |= uint64_t{1} << i;
    }
    for (int d = 0; d < head_v; d += 16) {
        const auto value = [&](int i) {
            const bool zero = i >= n || (header->bad >> i & 1);
            return zero ? _mm512_setzero_ps() : _mm512_loadu_ps(rows + static_cast<int64_t>(i) * head_v + d);
        };
        __m512 largest = _mm512_setzero_ps();
        for (int i = 0; i < n; ++i) largest = _mm512_max_ps(largest, _mm512_abs_ps(value(i)));
        // Channels whose values are tiny become zero.
        const __mmask16 used = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ);
        const __m512 factor = _mm512_maskz_div_ps(used, _mm512_set1_ps(value_limit), largest);
        _mm512_store_ps(scales + d, _mm512_maskz_mul_ps(used, largest, _mm512_set1_ps(1.0f / value_limit)));
        for (int i = 0; i < attention_keys; i += 2) {
            const __m512i even = _mm512_cvtps_epi32(_mm512_mul_ps(value(i), factor));
            const __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(value(i + 1), factor));
            const __m512i low = _mm512_and_si512(even, _mm512_set1_epi32(0xFFFF));
            _mm512_store_si512(to + i / 2 * head_v + d, _mm512_or_si512(low, _mm512_slli_epi32(odd, 16)));
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
