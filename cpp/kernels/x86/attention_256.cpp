// Attention for x86 with 256-bit registers: both products in 16-bit integers, everything between them in binary32. It
// is compiled for AVX2 (VPMADDWD) and for AVX-VNNI (VPDPWSSD). attention_int16.h explains how operands are scaled.
//
// Running softmax over blocks of 64 keys ("Online normalizer calculation for softmax", Milakov and Gimelshein, 2018;
// FlashAttention, Dao et al., 2022), with powers of two instead of e. A few rows at a time go through all steps of a
// block, so that scores and weights stay in L1.
#include "kernels/x86/attention_256_pack.h"
// After the intrinsics:
#include "kernels/isa.h"
#include "kernels/portable/score_rows.h"
#include "kernels/x86/avxvnni_encoding.h"

namespace agq {

AGQ_DECLARE_ISA(avx2)

namespace {

/// Rows that go through all steps of a block. Products take them in tiles of 6, the softmax 8 at once.
constexpr int rows_at_a_time = 24;
constexpr int registers = attention_keys / 8;

/// State of the rows of a call, and memory for the rows that are at work.
struct row_state : common_rows {
    float *scores;     ///< [rows_at_a_time][64]
    int16_t *weights;  ///< [rows_at_a_time][64], which include the scales of the values
    float *old_scale;  ///< [rows_at_a_time] the factor for the previous output
    float *factor;     ///< [rows_at_a_time] the factor for this block's integers
    size_t bytes;

    row_state(scratch_parts parts, int head_qk, int head_v) : common_rows(parts, head_qk, head_v) {
        scores = parts.take<float>(rows_at_a_time * attention_keys);
        weights = parts.take<int16_t>(rows_at_a_time * attention_keys);
        old_scale = parts.take<float>(rows_at_a_time);
        factor = parts.take<float>(rows_at_a_time);
        bytes = parts.bytes();
    }
};

size_t scratch_bytes(int head_qk, int head_v) {
    alignas(64) char none[64];
    return row_state(scratch_parts(none), head_qk, head_v).bytes;  // only computes addresses; no memory is accessed
}

// ---- arithmetic ----

/// sum + the products of two adjacent 16-bit integers.
inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
#ifdef AGQ_WITH_AVXVNNI
    asm(AGQ_AVXVNNI "vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#else
    // Inline assembly, because GCC 12 would keep accumulators in memory.
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
    return sum;
#endif
}

/// finish(r, j, sum of a[r][depth] * b[depth][register j]), in pairs of 16-bit integers, for R rows and two registers.
template <int R, typename Finish>
AGQ_INLINE void integer_tile(const int32_t *a, int64_t lda, const int32_t *b, int64_t ldb, int depth,
                             const Finish &finish) {
    __m256i sum[R][2];
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    int d = 0;
    do {  // do-while: otherwise the sums would pass through memory around the loop
        const __m256i right[2] = {_mm256_load_si256(reinterpret_cast<const __m256i *>(b)),
                                  _mm256_load_si256(reinterpret_cast<const __m256i *>(b + 8))};
        AGQ_UNROLL
        for (int r = 0; r < R; ++r) {
            const __m256i left = _mm256_set1_epi32(a[r * lda + d]);
            sum[r][0] = dot(sum[r][0], right[0], left);
            sum[r][1] = dot(sum[r][1], right[1], left);
        }
        b += ldb;
    } while (++d < depth);
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) {
        finish(r, 0, _mm256_cvtepi32_ps(sum[r][0]));
        finish(r, 1, _mm256_cvtepi32_ps(sum[r][1]));
    }
}

/// Calls finish(row, column, sums) for each eight columns of a row of the product a[rows][depth] * b[depth][columns];
/// `columns` is a multiple of 16.
template <typename Finish>
AGQ_INLINE void integer_product(const int32_t *a, int64_t lda, int rows, const int32_t *b, int columns, int depth,
                                const Finish &finish) {
    for (int column = 0; column < columns; column += 16) {
        const auto at = [&finish, column](int row) {
            return [&finish, column, row](int r, int j, __m256 sums) { finish(row + r, column + 8 * j, sums); };
        };
        int row = 0;
        for (; row + tile_rows <= rows; row += tile_rows)
            integer_tile<tile_rows>(a + row * lda, lda, b + column, columns, depth, at(row));
        for (; row + 2 <= rows; row += 2) integer_tile<2>(a + row * lda, lda, b + column, columns, depth, at(row));
        if (row < rows) integer_tile<1>(a + row * lda, lda, b + column, columns, depth, at(row));
    }
}

/// 2^x for N registers x <= 0, to 2.6e-6; 2^-112 if x is less than -112 or NaN. All registers go through each step
/// together, because a single one would wait for the previous step most of the time.
template <int N>
inline void powers_of_two(__m256 (&x)[N]) {
    // 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the sum.
    const __m256 magic = _mm256_set1_ps(12582912.0f);
    __m256 shifted[N], p[N];
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) {
        x[i] = _mm256_max_ps(x[i], _mm256_set1_ps(-112.0f));  // NaN gives the second operand
        shifted[i] = _mm256_add_ps(x[i], magic);
    }
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) {
        x[i] = _mm256_sub_ps(x[i], _mm256_sub_ps(shifted[i], magic));
        p[i] = _mm256_set1_ps(power_coefficients[0]);
    }
    AGQ_UNROLL
    for (int c = 1; c < 5; ++c) {
        AGQ_UNROLL
        for (int i = 0; i < N; ++i) p[i] = _mm256_fmadd_ps(p[i], x[i], _mm256_set1_ps(power_coefficients[c]));
    }
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted[i]), 23);
        x[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[i]), exponent));
    }
}

// ---- a block of keys ----

/// Turns a row's products with the 64 keys of a block, which have the keys' scales, into scores in powers of two.
/// Returns the largest of each lane.
inline __m256 finish_row(float *scores, float q_scale, const float *mask, float slope, float soft_cap) {
    const __m256 scale = _mm256_set1_ps(q_scale), bias = _mm256_set1_ps(slope * log2_e);
    __m256 best = _mm256_set1_ps(-INFINITY);
    for (int j = 0; j < attention_keys; j += 8) {
        __m256 score = _mm256_mul_ps(_mm256_load_ps(scores + j), scale);
        if (soft_cap != 0) score = (__m256)(capped((vec)score * (1 / log2_e), soft_cap) * log2_e);
        score = _mm256_fmadd_ps(_mm256_load_ps(mask + j), bias, score);
        _mm256_store_ps(scores + j, score);
        best = _mm256_max_ps(score, best);
    }
    return best;
}

/// Turns the products of n <= 8 rows into weights. The first is `row` of the call, and `at` of the rows at work.
void weigh(const attention_args &args, const row_state &state, int row, int at, int n, const float *value_scale) {
    float *scores = state.scores + at * attention_keys;
    __m256 best[8], sums[8], scaled_sums[8];
    for (int r = 0; r < n; ++r) {
        const int token = (row + r) / args.group;
        best[r] = finish_row(scores + r * attention_keys, state.q_scale[row + r], state.masks + token * attention_keys,
                             args.slopes[row + r - token * args.group], args.soft_cap);
    }
    for (int r = n; r < 8; ++r) best[r] = best[0];
    const __m256 tops = reduce_rows<maximum_of>(best);
    alignas(32) float top[8];
    _mm256_store_ps(top, tops);
    for (int r = 0; r < n; ++r) {
        __m256 sum[2], scaled_sum[2], scaled_best[2];
        AGQ_UNROLL
        for (int half = 0; half < 2; ++half) {
            float *part = scores + r * attention_keys + half * (attention_keys / 2);
            const float *scale = value_scale + half * (attention_keys / 2);
            __m256 x[registers / 2], visible[registers / 2];
            AGQ_UNROLL
            for (int i = 0; i < registers / 2; ++i) {
                x[i] = _mm256_sub_ps(_mm256_load_ps(part + 8 * i), _mm256_set1_ps(top[r]));
                visible[i] = _mm256_cmp_ps(x[i], _mm256_set1_ps(-112.0f), _CMP_GT_OQ);
            }
            powers_of_two(x);
            AGQ_UNROLL
            for (int i = 0; i < registers / 2; ++i) {
                // Exactly 0 for hidden keys, also if all are hidden (x is NaN): 2^-112 would count beside values of 0,
                // and its products would be subnormal, which is slow.
                x[i] = _mm256_and_ps(x[i], visible[i]);
                const __m256 scaled = _mm256_mul_ps(x[i], _mm256_load_ps(scale + 8 * i));
                sum[half] = i == 0 ? x[0] : _mm256_add_ps(sum[half], x[i]);
                scaled_sum[half] = i == 0 ? scaled : _mm256_add_ps(scaled_sum[half], scaled);
                scaled_best[half] = i == 0 ? scaled : _mm256_max_ps(scaled_best[half], scaled);
                _mm256_store_ps(part + 8 * i, scaled);
            }
        }
        sums[r] = _mm256_add_ps(sum[0], sum[1]);
        scaled_sums[r] = _mm256_add_ps(scaled_sum[0], scaled_sum[1]);
        best[r] = _mm256_max_ps(scaled_best[0], scaled_best[1]);
    }
    for (int r = n; r < 8; ++r) {
        sums[r] = sums[0];
        scaled_sums[r] = scaled_sums[0];
        best[r] = best[0];
    }

    // The new maximum of each row, and the factors for the previous output and for this block.
    const __m256i lanes = first_lanes(n);
    const __m256 before = _mm256_loadu_ps(state.maximum + row), after = _mm256_max_ps(before, tops);
    __m256 relative[2] = {_mm256_sub_ps(before, after), _mm256_sub_ps(tops, after)};
    powers_of_two(relative);
    // Exactly 1 if the maximum stays: a block that is hidden from a row must not change its bits, and whether such a
    // block is left out depends on the other rows of the call.
    relative[0] = _mm256_blendv_ps(relative[0], _mm256_set1_ps(1.0f), _mm256_cmp_ps(before, after, _CMP_EQ_OQ));
    const __m256 totals = reduce_rows<total_of>(sums);
    const __m256 tiny = _mm256_set1_ps(0x1p-100f);  // so that the limits stay finite if all values are zero
    const __m256 scaled_totals = _mm256_max_ps(reduce_rows<total_of>(scaled_sums), tiny);
    const __m256 scaled_tops = _mm256_max_ps(reduce_rows<maximum_of>(best), tiny);
    const __m256 units = _mm256_min_ps(_mm256_div_ps(_mm256_set1_ps(weight_sum_limit), scaled_totals),
                                       _mm256_div_ps(_mm256_set1_ps(weight_limit), scaled_tops));
    const __m256 sum = _mm256_mul_ps(_mm256_loadu_ps(state.sum + row), relative[0]);
    _mm256_maskstore_ps(state.sum + row, lanes, _mm256_fmadd_ps(totals, relative[1], sum));
    _mm256_maskstore_ps(state.maximum + row, lanes, after);
    _mm256_store_ps(state.old_scale + at, relative[0]);
    _mm256_store_ps(state.factor + at, _mm256_div_ps(relative[1], units));
    alignas(32) float unit[8];
    _mm256_store_ps(unit, units);
    for (int r = 0; r < n; ++r) {
        const float *from = scores + r * attention_keys;
        int16_t *to = state.weights + (at + r) * attention_keys;
        const __m256 factor = _mm256_set1_ps(unit[r]);
        AGQ_UNROLL
        for (int j = 0; j < attention_keys; j += 16) {
            const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(from + j), factor));
            const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(from + j + 8), factor));
            // Packed in 128-bit lanes, so the middle two quarters change places.
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
            _mm256_store_si256(reinterpret_cast<__m256i *>(to + j), packed);
        }
    }
}

/// A block, for n rows that begin at `row`; n is at most rows_at_a_time.
void attend_rows(const attention_args &args, const row_state &state, int row, int n, const block_header *keys,
                 const block_header *values) {
    const int pairs = channel_pairs(args.head_qk);
    // By value, because every store could change what the arguments point to.
    float *scores = state.scores;
    const float *key_scale = keys->scale;
    integer_product(state.q + static_cast<int64_t>(row) * pairs, pairs, n, reinterpret_cast<const int32_t *>(keys + 1),
                    attention_keys, pairs, [scores, key_scale](int r, int column, __m256 sums) {
                        const __m256 scale = _mm256_load_ps(key_scale + column);
                        _mm256_store_ps(scores + r * attention_keys + column, _mm256_mul_ps(sums, scale));
                    });
    for (int at = 0; at < n; at += 8) weigh(args, state, row + at, at, n - at < 8 ? n - at : 8, values->scale);
    const int64_t head_v = args.head_v;
    float *out = state.out + row * head_v;
    const float *old_scale = state.old_scale, *factor = state.factor;
    integer_product(reinterpret_cast<const int32_t *>(state.weights), attention_keys / 2, n,
                    reinterpret_cast<const int32_t *>(values + 1), args.head_v, attention_keys / 2,
                    [out, head_v, old_scale, factor](int r, int column, __m256 sums) {
                        float *to = out + r * head_v + column;
                        const __m256 before = _mm256_mul_ps(_mm256_load_ps(to), _mm256_set1_ps(old_scale[r]));
                        _mm256_store_ps(to, _mm256_fmadd_ps(sums, _mm256_set1_ps(factor[r]), before));
                    });
}

void attend(const attention_args &args) {
    const int rows = args.n_tokens * args.group, head_v = args.head_v;
    const row_state state(scratch_parts(args.scratch), args.head_qk, head_v);
    state.start(args);
    const char *key_block = static_cast<const char *>(args.keys), *value_block = static_cast<const char *>(args.values);
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        const block_header *keys = reinterpret_cast<const block_header *>(key_block);
        const block_header *values = reinterpret_cast<const block_header *>(value_block);
        const auto [begin, end] = read_masks(args, first, state.masks);
        if (const uint64_t bad = keys->bad | values->bad) mark_bad(args, state.masks, state.bad, bad);
        for (int row = begin * args.group; row < end * args.group; row += rows_at_a_time) {
            const int left = end * args.group - row;
            attend_rows(args, state, row, left < rows_at_a_time ? left : rows_at_a_time, keys, values);
        }
        key_block += key_bytes(args.head_qk);
        value_block += value_bytes(head_v);
    }
    for (int r = 0; r < rows; ++r) {
        const __m256 inverse = _mm256_set1_ps(state.inverse(r));
        float *to = args.out + r / args.group * args.out_token_stride + r % args.group * args.out_head_stride;
        const float *out = state.out + static_cast<int64_t>(r) * head_v;
        for (int i = 0; i < head_v; i += 8) _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_load_ps(out + i), inverse));
    }
}

}  // namespace

namespace isa::AGQ_ISA {

const attention_kernel attention = {key_bytes,      value_bytes, scratch_bytes, pack_keys,
                                    pack_values,    attend,      f16_to_f32,    isa::avx2::softmax_weights,
                                    &isa::avx2::few};

}  // namespace isa::AGQ_ISA
}  // namespace agq
