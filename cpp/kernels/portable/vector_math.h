// Shared by the binary32 kernels, written with the compiler's vector types. A .cpp file includes it once.
// cmake/kernels.cmake defines AGQ_VECTOR (floats per register) and AGQ_TILE_COLUMNS (registers per tile row) for each
// instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/portable/unroll.h"
#ifdef __F16C__
#if defined(__AVX512F__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12's headers initialize many variables with themselves in intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace agq {
namespace {

typedef float vec __attribute__((vector_size(AGQ_VECTOR * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(AGQ_VECTOR * 4), aligned(4), may_alias));

constexpr int tile_rows = 6;

inline vec load(const float *p) {
    return *reinterpret_cast<const vec *>(p);
}
inline void store(float *p, vec v) {
    *reinterpret_cast<vec *>(p) = v;
}
inline vec splat(float x) {
    return x - vec{};  // not 0 + x, which turns -0 into 0, so that compilers really add
}

#if AGQ_VECTOR == 4
#define AGQ_EVEN 0, 2, 4, 6
#define AGQ_ODD 1, 3, 5, 7
#elif AGQ_VECTOR == 8
#define AGQ_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define AGQ_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define AGQ_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define AGQ_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#endif

// GCC has the portable name since version 12.
#if defined(__clang__) || __GNUC__ >= 12
#define AGQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define AGQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

/// The elements with even index of `a`, then of `b`; and those with odd index.
inline vec even(vec a, vec b) {
    return AGQ_SHUFFLE(a, b, AGQ_EVEN);
}
inline vec odd(vec a, vec b) {
    return AGQ_SHUFFLE(a, b, AGQ_ODD);
}

/// Sums of adjacent elements: those of `a` in the first half, those of `b` in the second.
inline vec fold(vec a, vec b) {
    return even(a, b) + odd(a, b);
}

inline float total(vec v) {
    for (int n = AGQ_VECTOR; n > 1; n /= 2) v = fold(v, v);
    return v[0];
}

/// The largest element. No element may be NaN.
inline float largest(vec v) {
    for (int n = AGQ_VECTOR; n > 1; n /= 2) {
        const vec a = even(v, v), b = odd(v, v);
        v = b > a ? b : a;
    }
    return v[0];
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023u;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7F800000u | mantissa << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &magnitude, 4);
        bits |= sign;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void f16_to_f32(const uint16_t *from, float *to, int64_t n) {
    int64_t i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + i))));
    }
#endif
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
    }
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
#endif
    for (; i < n; ++i) to[i] = half_to_float(from[i]);
}

/// e^x for x <= 0, within 2 units in the last place; 0 below -87.
inline vec exponential(vec x) {
    const vec bounded = x < -87.0f ? splat(-87.0f) : x;
    // 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the sum.
    const vec magic = splat(12582912.0f);
    const vec shifted = bounded * 1.44269504f + magic;
    const vec n = shifted - magic;
    const vec r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ivec power = (reinterpret_cast<const ivec &>(shifted) << 23) + 0x3F800000;
    const vec result = p * reinterpret_cast<const vec &>(power);
    return x < -87.0f ? vec{} : result;
}

/// c[R][C vectors] = (Add ? c : 0) + a[R][depth] * b[depth][C vectors]; depth > 0
template <int R, int C, bool Add>
inline void tile(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t depth) {
    vec sum[R][C];
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) {
        AGQ_UNROLL
        for (int j = 0; j < C; ++j) sum[r][j] = Add ? load(c + r * ldc + j * AGQ_VECTOR) : vec{};
    }
    int64_t d = 0;
    do {  // do-while: otherwise the sums would pass through memory around the loop
        vec right[C];
        AGQ_UNROLL
        for (int j = 0; j < C; ++j) right[j] = load(b + d * ldb + j * AGQ_VECTOR);
        AGQ_UNROLL
        for (int r = 0; r < R; ++r) {
            const vec left = splat(a[r * lda + d]);
            AGQ_UNROLL
            for (int j = 0; j < C; ++j) sum[r][j] += left * right[j];
        }
    } while (++d < depth);
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) {
        AGQ_UNROLL
        for (int j = 0; j < C; ++j) store(c + r * ldc + j * AGQ_VECTOR, sum[r][j]);
    }
}

template <int R, bool Add>
inline void tile_row(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t depth,
                     int64_t columns) {
    int64_t j = 0;
    for (; j + AGQ_TILE_COLUMNS * AGQ_VECTOR <= columns; j += AGQ_TILE_COLUMNS * AGQ_VECTOR) {
        tile<R, AGQ_TILE_COLUMNS, Add>(a, lda, b + j, ldb, c + j, ldc, depth);
    }
    for (; j < columns; j += AGQ_VECTOR) tile<R, 1, Add>(a, lda, b + j, ldb, c + j, ldc, depth);
}

/// `columns` is a multiple of AGQ_VECTOR.
template <bool Add>
void multiply(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
              int64_t depth, int64_t columns) {
    int64_t r = 0;
    for (; r + tile_rows <= rows; r += tile_rows) {
        tile_row<tile_rows, Add>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
    }
    for (; r + 2 <= rows; r += 2) tile_row<2, Add>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
    for (; r < rows; ++r) tile_row<1, Add>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
}

}  // namespace
}  // namespace agq
