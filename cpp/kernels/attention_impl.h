// Attention in binary32, for all instruction sets that have nothing better: written with the compiler's vector types. A
// file includes it once, after it has defined AGQ_VECTOR (floats per register) and AGQ_TILE_COLUMNS (registers of a
// tile row), and is compiled for one instruction set.
//
// Running softmax over blocks of 64 keys ("Online normalizer calculation for softmax", Milakov and Gimelshein, 2018;
// FlashAttention, Dao et al., 2022): scores of a block, new maximum of each row, exponentials, then the output so far
// is scaled down to the new maximum and the block's values are added. Both products are tiles of 6 rows in registers.
#include <cmath>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attention.h"

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

void f16_to_f32(const uint16_t *from, float *to, int64_t n) {
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

/// Mask of a token for the block of keys that begins at `first`, as floats; keys beyond the last are hidden. Returns
/// whether any key can be seen.
inline bool read_mask(const attention_args &args, int token, int64_t first, float *mask) {
    const int n = static_cast<int>(args.n_keys - first < attention_keys ? args.n_keys - first : attention_keys);
    const char *row = args.mask ? args.mask + static_cast<size_t>(token) * args.mask_stride : nullptr;
    if (!row) {
        std::memset(mask, 0, sizeof(float) * attention_keys);
    } else if (args.mask_is_f16) {
        f16_to_f32(reinterpret_cast<const uint16_t *>(row) + first, mask, n);
    } else {
        std::memcpy(mask, reinterpret_cast<const float *>(row) + first, sizeof(float) * static_cast<size_t>(n));
    }
    for (int j = n; j < attention_keys; ++j) mask[j] = -INFINITY;
    ivec visible{};
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) visible |= load(mask + j) != splat(-INFINITY);
    bool any = false;
    for (int i = 0; i < AGQ_VECTOR; ++i) any = any || visible[i] != 0;
    return any;
}

/// Turns a row of scores into weights relative to the new maximum. Returns by how much the output so far has to be
/// scaled.
inline float weigh(float *scores, const float *mask, float slope, float soft_cap, float *maximum, float *sum) {
    vec best = splat(*maximum);
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) {
        vec s = load(scores + j);
        if (soft_cap != 0) {
            const vec y = s / soft_cap, magnitude = y < 0.0f ? -y : y;
            const vec e = exponential(magnitude * -2.0f);  // tanh |y| = (1 - e^-2|y|) / (1 + e^-2|y|)
            const vec t = (1.0f - e) / (1.0f + e) * soft_cap;
            s = y < 0.0f ? -t : t;
        }
        s += load(mask + j) * slope;
        store(scores + j, s);
        best = s > best ? s : best;
    }
    float top = *maximum;
    for (int i = 0; i < AGQ_VECTOR; ++i) top = best[i] > top ? best[i] : top;
    if (top == -INFINITY) {
        // All keys are hidden, or the scores are no numbers, which the comparisons above pass over.
        for (int j = 0; j < attention_keys; ++j) {
            if (scores[j] != scores[j]) *sum = scores[j];
        }
        for (int j = 0; j < attention_keys; j += AGQ_VECTOR) store(scores + j, vec{});
        return 1;
    }
    vec total{};
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) {
        const vec p = exponential(load(scores + j) - top);
        store(scores + j, p);
        total += p;
    }
    const float scale = *maximum == -INFINITY ? 0.0f : std::exp(*maximum - top);
    float added = 0;
    for (int i = 0; i < AGQ_VECTOR; ++i) added += total[i];
    *sum = *sum * scale + added;
    *maximum = top;
    return scale;
}

// Packed keys are [head_qk][64], packed values [64][head_v].

inline size_t round_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

size_t key_bytes(int head_qk) {
    return static_cast<size_t>(head_qk) * attention_keys * sizeof(float);
}

size_t value_bytes(int head_v) {
    return static_cast<size_t>(head_v) * attention_keys * sizeof(float);
}

/// Rows of outputs, of scores and of masks, and two numbers for each row.
size_t scratch_bytes(int, int head_v) {
    return round_up(sizeof(float) * attention_row_limit * (static_cast<size_t>(head_v) + 2 * attention_keys + 2));
}

void pack_keys(const float *rows, int n, int head_qk, void *packed) {
    float *to = static_cast<float *>(packed);
    for (int d = 0; d < head_qk; ++d, to += attention_keys) {
        for (int i = 0; i < attention_keys; ++i) to[i] = i < n ? rows[static_cast<int64_t>(i) * head_qk + d] : 0.0f;
    }
}

void pack_values(const float *rows, int n, int head_v, void *packed) {
    const size_t given = sizeof(float) * static_cast<size_t>(n) * static_cast<size_t>(head_v);
    std::memcpy(packed, rows, given);
    std::memset(static_cast<char *>(packed) + given, 0, value_bytes(head_v) - given);
}

void attend(const attention_args &args) {
    const int rows = args.n_tokens * args.group;
    const int64_t head_v = args.head_v;
    const float *keys = static_cast<const float *>(args.keys), *values = static_cast<const float *>(args.values);
    float *out = static_cast<float *>(args.scratch), *scores = out + rows * head_v,
          *maximum = scores + rows * attention_keys;
    float *sum = maximum + rows, *masks = sum + rows;
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows * head_v));
    for (int r = 0; r < rows; ++r) {
        maximum[r] = args.sinks ? args.sinks[r % args.group] : -INFINITY;
        sum[r] = args.sinks ? 1.0f : 0.0f;
    }
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        // Tokens ascend, so with a causal mask the first ones see the fewest keys: leave out those that see none here.
        int begin = args.n_tokens, end = 0;
        for (int t = 0; t < args.n_tokens; ++t) {
            if (read_mask(args, t, first, masks + t * attention_keys)) {
                begin = t < begin ? t : begin;
                end = t + 1;
            }
        }
        if (begin >= end) continue;
        const int64_t from = static_cast<int64_t>(begin) * args.group,
                      n = static_cast<int64_t>(end) * args.group - from;
        const int64_t block = first / attention_keys;
        multiply<false>(args.q + from * args.head_qk, args.head_qk, keys + block * args.head_qk * attention_keys,
                        attention_keys, scores + from * attention_keys, attention_keys, n, args.head_qk,
                        attention_keys);
        for (int64_t r = from; r < from + n; ++r) {
            const float scale = weigh(scores + r * attention_keys, masks + r / args.group * attention_keys,
                                      args.slopes[r % args.group], args.soft_cap, maximum + r, sum + r);
            if (scale != 1) {
                for (int64_t i = 0; i < head_v; i += AGQ_VECTOR)
                    store(out + r * head_v + i, load(out + r * head_v + i) * scale);
            }
        }
        multiply<true>(scores + from * attention_keys, attention_keys, values + block * attention_keys * head_v, head_v,
                       out + from * head_v, head_v, n, attention_keys, head_v);
    }
    for (int r = 0; r < rows; ++r) {
        const vec inverse = splat(sum[r] == 0 ? 0.0f : 1.0f / sum[r]);
        float *to = args.out + r / args.group * args.out_token_stride + r % args.group * args.out_head_stride;
        for (int64_t i = 0; i < head_v; i += AGQ_VECTOR) store(to + i, load(out + r * head_v + i) * inverse);
    }
}

}  // namespace
}  // namespace agq

#define AGQ_ATTENTION_TABLE {key_bytes, value_bytes, scratch_bytes, pack_keys, pack_values, attend, f16_to_f32}
