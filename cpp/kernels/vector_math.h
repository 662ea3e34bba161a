// What the kernels in binary32 share, written with the compiler's vector types. A file includes it once, after it has
// defined AGQ_VECTOR (floats per register) and AGQ_TILE_COLUMNS (registers of a tile row), and is compiled for one
// instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __F16C__
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
    return vec{} + x;
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

/// c[R][C vectors] = (Add ? c : 0) + a[R][depth] * b[depth][C vectors]
template <int R, int C, bool Add>
inline void tile(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t depth) {
    vec sum[R][C];
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < C; ++j) sum[r][j] = Add ? load(c + r * ldc + j * AGQ_VECTOR) : vec{};
    }
    for (int64_t d = 0; d < depth; ++d) {
        vec right[C];
        for (int j = 0; j < C; ++j) right[j] = load(b + d * ldb + j * AGQ_VECTOR);
        for (int r = 0; r < R; ++r) {
            const vec left = splat(a[r * lda + d]);
            for (int j = 0; j < C; ++j) sum[r][j] += left * right[j];
        }
    }
    for (int r = 0; r < R; ++r) {
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
