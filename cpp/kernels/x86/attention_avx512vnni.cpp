// Attention for AVX-512 with VNNI: both products in 16-bit integers (VPDPWSSD, twice as fast as binary32), everything
// between them in binary32.
//
// attention_int16.h explains how operands are scaled.
//
// Running softmax over blocks of 64 keys ("Online normalizer calculation for softmax", Milakov and Gimelshein, 2018;
// FlashAttention, Dao et al., 2022), with powers of two instead of e. Six rows at a time go through all three steps of
// a block, so that scores stay in registers and weights in L1.
#include "kernels/isa.h"
#include "kernels/portable/unroll.h"
#include "kernels/x86/attention_avx512vnni_pack.h"

namespace agq {
namespace {

constexpr int tile_rows = 6;

/// State of the rows of a call. Masks are in powers of two, as scores are.
struct row_state : common_rows {
    uint8_t *visible;       ///< [tokens] number of leading registers of 16 keys that hold all visible keys of a block
    signed char *unbiased;  ///< [tokens] whether the mask adds nothing in these registers
    size_t bytes;

    row_state(scratch_parts parts, int head_qk, int head_v) : common_rows(parts, head_qk, head_v) {
        visible = parts.take<unsigned char>(attention_row_limit);
        unbiased = parts.take<signed char>(attention_row_limit);
        bytes = parts.bytes();
    }
};

size_t scratch_bytes(int head_qk, int head_v) {
    alignas(64) char none[64];
    return row_state(scratch_parts(none), head_qk, head_v).bytes;  // only computes addresses; no memory is accessed
}

// ---- arithmetic ----

/// sum + the products of two adjacent 16-bit integers. Inline assembly, because GCC 12 copies the accumulators of the
/// intrinsic from register to register.
inline __m512i dot(__m512i sum, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

/// 2^x for N registers x <= 0, to 2.6e-6; nearly 0 if x < -112 or NaN. All registers go through each step together,
/// because a single one would wait for the previous step most of the time.
template <int N>
inline void powers_of_two(__m512 (&x)[N]) {
    // 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the sum.
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    __m512 shifted[N], p[N];
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) x[i] = _mm512_max_ps(x[i], _mm512_set1_ps(-112.0f));  // NaN gives the second operand
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) shifted[i] = _mm512_add_ps(x[i], magic);
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) p[i] = _mm512_sub_ps(shifted[i], magic);
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) x[i] = _mm512_sub_ps(x[i], p[i]);
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) p[i] = _mm512_set1_ps(power_coefficients[0]);
    AGQ_UNROLL
    for (int c = 1; c < 5; ++c) {
        AGQ_UNROLL
        for (int i = 0; i < N; ++i) p[i] = _mm512_fmadd_ps(p[i], x[i], _mm512_set1_ps(power_coefficients[c]));
    }
    AGQ_UNROLL
    for (int i = 0; i < N; ++i) {
        const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted[i]), 23);
        x[i] = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p[i]), exponent));
    }
}

inline __m512 power_of_two(__m512 x) {
    __m512 one[1] = {x};
    powers_of_two(one);
    return one[0];
}

/// The low halves of 16 + 16 integers.
inline __m512i low_halves(__m512i a, __m512i b) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi16(a, even, b);
}

/// c tanh(score / c), with the scores and `cap` in powers of two; `cap_e` is c itself.
inline __m512 capped(__m512 score, float cap, float cap_e) {
    const __m512 e = power_of_two(_mm512_mul_ps(_mm512_abs_ps(score), _mm512_set1_ps(-2.0f / cap_e)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 t = _mm512_mul_ps(_mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e)), _mm512_set1_ps(cap));
    const __mmask16 negative = _mm512_cmp_ps_mask(score, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_sub_ps(t, negative, _mm512_setzero_ps(), t);
}

/// sum[R rows][C registers] = a[R][depth] * b[depth][C registers], in pairs of 16-bit integers.
template <int R, int C>
inline void multiply(const int32_t *a, int64_t lda, const int32_t *b, int64_t ldb, int depth, __m512i (&sum)[R][C]) {
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) {
        AGQ_UNROLL
        for (int j = 0; j < C; ++j) sum[r][j] = _mm512_setzero_si512();
    }
    for (int d = 0; d < depth; ++d, b += ldb) {
        __m512i right[C];
        AGQ_UNROLL
        for (int j = 0; j < C; ++j) right[j] = _mm512_load_si512(b + 16 * j);
        AGQ_UNROLL
        for (int r = 0; r < R; ++r) {
            const __m512i left = _mm512_set1_epi32(a[r * lda + d]);
            AGQ_UNROLL
            for (int j = 0; j < C; ++j) sum[r][j] = dot(sum[r][j], right[j], left);
        }
    }
}

// ---- a block of keys ----

/// What the rows of a tile pass from the scores to the values.
struct tile_weights {
    alignas(64) int16_t weight[tile_rows][attention_keys];
    alignas(64) float old_scale[16];  ///< per row: the factor for the previous output
    alignas(64) float factor[16];     ///< per row: the factor for this block's integers
};

/// The maximum or total of each of eight registers, in lanes 0 to 7; the other lanes are 0.
template <class operation>
inline __m512 reduce_rows(const __m512 (&x)[8]) {
    __m256 half[8];
    AGQ_UNROLL
    for (int i = 0; i < 8; ++i) {
        half[i] = operation::of(_mm512_castps512_ps256(x[i]),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x[i]), 1)));
    }
    const __m256 all = reduce_rows<operation>(half);
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_setzero_pd(), _mm256_castps_pd(all), 0));
}

/// Scores of R rows, starting at `row`, with the first 16 C keys of the block, and their weights, which include the
/// scales of the values.
template <int R, int C, bool biased>
void weigh(const attention_args &args, const row_state &state, int row, const block_header *keys,
           const block_header *values, tile_weights *out) {
    const int pairs = channel_pairs(args.head_qk);
    const int32_t *b = reinterpret_cast<const int32_t *>(keys + 1);
    alignas(64) float scores[R][16 * C];
    __m512 best[8];
    {
        __m512i integers[R][C];
        multiply<R, C>(state.q + static_cast<int64_t>(row) * pairs, pairs, b, attention_keys, pairs, integers);
        AGQ_UNROLL
        for (int r = 0; r < R; ++r) {
            AGQ_UNROLL
            for (int j = 0; j < C; ++j) {
                const __m512 scale = _mm512_load_ps(keys->scale + 16 * j);
                __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(integers[r][j]), scale);
                if (biased) {
                    const int token = (row + r) / args.group;
                    score = _mm512_mul_ps(score, _mm512_set1_ps(state.q_scale[row + r]));
                    if (args.soft_cap != 0) score = capped(score, args.soft_cap * log2_e, args.soft_cap);
                    const __m512 mask = _mm512_load_ps(state.masks + token * attention_keys + 16 * j);
                    score = _mm512_fmadd_ps(mask, _mm512_set1_ps(args.slopes[(row + r) % args.group]), score);
                }
                _mm512_store_ps(scores[r] + 16 * j, score);
                best[r] = j == 0 ? score : _mm512_max_ps(best[r], score);
            }
        }
    }
    AGQ_UNROLL
    for (int r = R; r < 8; ++r) best[r] = best[0];

    // Without a bias, scores are in units of q_scale up to this point.
    __m512 tops = reduce_rows<maximum_of>(best);
    if (!biased) tops = _mm512_mul_ps(tops, _mm512_loadu_ps(state.q_scale + row));
    constexpr int batch = R % 2 == 0 ? 2 : 1;
    __m512 sums[8], scaled_sums[8];
    AGQ_UNROLL
    for (int r = 0; r < R; r += batch) {
        __m512 x[batch * C];
        AGQ_UNROLL
        for (int i = 0; i < batch * C; ++i) {
            const int at = r + i / C;
            const __m512 top = _mm512_permutexvar_ps(_mm512_set1_epi32(at), tops);
            // Rounded before the difference, as with a bias: a row gets the same bits in every tile.
            __m512 score = _mm512_load_ps(scores[at] + 16 * (i % C));
            if (!biased) score = _mm512_mul_ps(score, _mm512_set1_ps(state.q_scale[row + at]));
            x[i] = _mm512_sub_ps(score, top);
        }
        powers_of_two(x);
        AGQ_UNROLL
        for (int i = 0; i < batch * C; ++i) {
            const int at = r + i / C;
            const __m512 scaled = _mm512_mul_ps(x[i], _mm512_load_ps(values->scale + 16 * (i % C)));
            sums[at] = i % C == 0 ? x[i] : _mm512_add_ps(sums[at], x[i]);
            scaled_sums[at] = i % C == 0 ? scaled : _mm512_add_ps(scaled_sums[at], scaled);
            best[at] = i % C == 0 ? scaled : _mm512_max_ps(best[at], scaled);
            _mm512_store_ps(scores[at] + 16 * (i % C), scaled);
        }
    }
    AGQ_UNROLL
    for (int r = R; r < 8; ++r) {
        sums[r] = sums[0];
        scaled_sums[r] = scaled_sums[0];
        best[r] = best[0];
    }

    // The new maximum of each row, and the factors for the previous output and for this block.
    constexpr __mmask16 lanes = (1 << R) - 1;
    const __m512 before = _mm512_loadu_ps(state.maximum + row), after = _mm512_max_ps(before, tops);
    __m512 relative[2] = {_mm512_sub_ps(before, after), _mm512_sub_ps(tops, after)};
    powers_of_two(relative);
    // Exactly 1 if the maximum stays: a block that is hidden from a row must not change its bits, and whether such a
    // block is left out depends on the other rows of the tile.
    relative[0] = _mm512_mask_mov_ps(relative[0], _mm512_cmp_ps_mask(before, after, _CMP_EQ_OQ), _mm512_set1_ps(1.0f));
    const __m512 totals = reduce_rows<total_of>(sums);
    const __m512 tiny = _mm512_set1_ps(0x1p-100f);  // so that the limits stay finite if all values are zero
    const __m512 scaled_totals = _mm512_max_ps(reduce_rows<total_of>(scaled_sums), tiny);
    const __m512 scaled_tops = _mm512_max_ps(reduce_rows<maximum_of>(best), tiny);
    const __m512 units = _mm512_min_ps(_mm512_div_ps(_mm512_set1_ps(weight_sum_limit), scaled_totals),
                                       _mm512_div_ps(_mm512_set1_ps(weight_limit), scaled_tops));
    const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(state.sum + row), relative[0]);
    _mm512_mask_storeu_ps(state.sum + row, lanes, _mm512_fmadd_ps(totals, relative[1], sum));
    _mm512_mask_storeu_ps(state.maximum + row, lanes, after);
    _mm512_store_ps(out->old_scale, relative[0]);
    _mm512_store_ps(out->factor, _mm512_div_ps(relative[1], units));
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) {
        const __m512 unit = _mm512_permutexvar_ps(_mm512_set1_epi32(r), units);
        __m512i weight[4];
        AGQ_UNROLL
        for (int j = 0; j < 4; ++j) {
            weight[j] = j < C ? _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(scores[r] + 16 * j), unit))
                              : _mm512_setzero_si512();
        }
        _mm512_store_si512(out->weight[r], low_halves(weight[0], weight[1]));
        if (C > 2) _mm512_store_si512(out->weight[r] + 32, low_halves(weight[2], weight[3]));
    }
}

/// Adds the values of the block's first `pairs` pairs of keys to C registers of the outputs of R rows.
template <int R, int C>
void add_values(const tile_weights &tile, int pairs, const int32_t *values, int head_v, float *out) {
    __m512i integers[R][C];
    multiply<R, C>(reinterpret_cast<const int32_t *>(tile.weight), attention_keys / 2, values, head_v, pairs, integers);
    AGQ_UNROLL
    for (int r = 0; r < R; ++r) {
        const __m512 old_scale = _mm512_set1_ps(tile.old_scale[r]), factor = _mm512_set1_ps(tile.factor[r]);
        AGQ_UNROLL
        for (int j = 0; j < C; ++j) {
            float *to = out + r * head_v + 16 * j;
            const __m512 before = _mm512_mul_ps(_mm512_load_ps(to), old_scale);
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers[r][j]), factor, before));
        }
    }
}

using weigh_fn = void (*)(const attention_args &, const row_state &, int, const block_header *, const block_header *,
                          tile_weights *);

/// R rows and one block; only the first `columns` registers of keys are used.
template <int R>
void attend_tile(const attention_args &args, const row_state &state, int row, const block_header *keys,
                 const block_header *values, int columns, bool biased) {
    static constexpr weigh_fn table[2][4] = {
        {weigh<R, 1, false>, weigh<R, 2, false>, weigh<R, 3, false>, weigh<R, 4, false>},
        {weigh<R, 1, true>, weigh<R, 2, true>, weigh<R, 3, true>, weigh<R, 4, true>}};
    tile_weights tile;
    table[biased][columns - 1](args, state, row, keys, values, &tile);
    const int head_v = args.head_v, pairs = 8 * columns;
    const int32_t *data = reinterpret_cast<const int32_t *>(values + 1);
    float *out = state.out + static_cast<int64_t>(row) * head_v;
    int d = 0;
    for (; d + 64 <= head_v; d += 64) add_values<R, 4>(tile, pairs, data + d, head_v, out + d);
    for (; d + 32 <= head_v; d += 32) add_values<R, 2>(tile, pairs, data + d, head_v, out + d);
    for (; d < head_v; d += 16) add_values<R, 1>(tile, pairs, data + d, head_v, out + d);
}

/// Reads a token's mask for the block of keys that begins at `first`; keys past the last are hidden.
void read_mask(const attention_args &args, const row_state &state, int token, int64_t first) {
    const int n = static_cast<int>(args.n_keys - first < attention_keys ? args.n_keys - first : attention_keys);
    const char *row = args.mask ? args.mask + static_cast<size_t>(token) * args.mask_stride : nullptr;
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    int visible = 0, zeros = 0;  // registers up to the last visible key; leading registers of zeros only
    for (int j = 0; j < 4; ++j) {
        const int left = n - 16 * j;
        const __mmask16 lanes = first_lanes(left > 0 ? left : 0);
        __m512 mask = _mm512_setzero_ps();
        if (row && args.mask_is_f16) {
            const uint16_t *from = reinterpret_cast<const uint16_t *>(row) + first + 16 * j;
            mask = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
        } else if (row) {
            mask = _mm512_maskz_loadu_ps(lanes, reinterpret_cast<const float *>(row) + first + 16 * j);
        }
        mask = _mm512_mask_mul_ps(hidden, lanes, mask, _mm512_set1_ps(log2_e));
        _mm512_store_ps(state.masks + token * attention_keys + 16 * j, mask);
        if (_mm512_cmp_ps_mask(mask, hidden, _CMP_NEQ_UQ)) visible = j + 1;
        if (_mm512_cmp_ps_mask(mask, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xFFFF && zeros == j) zeros = j + 1;
    }
    state.visible[token] = static_cast<unsigned char>(visible);
    state.unbiased[token] = zeros >= visible;
}

void attend_block(const attention_args &args, const row_state &state, const block_header *keys,
                  const block_header *values) {
    const int rows = args.n_tokens * args.group;
    if (const uint64_t bad = keys->bad | values->bad) mark_bad(args, state.masks, state.bad, bad);
    for (int row = 0; row < rows;) {
        const int left = rows - row, n = left >= tile_rows ? tile_rows : left >= 2 ? 2 : 1;
        int columns = 0;
        bool biased = args.soft_cap != 0;
        for (int t = row / args.group; t <= (row + n - 1) / args.group; ++t) {
            // The mask is needed for registers that only some of the tokens see.
            if (t > row / args.group && state.visible[t] != columns) biased = true;
            if (state.visible[t] > columns) columns = state.visible[t];
            if (!state.unbiased[t]) biased = true;
        }
        if (columns > 0) {
            const auto run = n == tile_rows ? attend_tile<tile_rows> : n == 2 ? attend_tile<2> : attend_tile<1>;
            run(args, state, row, keys, values, columns, biased);
        }
        row += n;
    }
}

void attend(const attention_args &args) {
    const int rows = args.n_tokens * args.group, head_v = args.head_v;
    const row_state state(scratch_parts(args.scratch), args.head_qk, head_v);
    state.start(args);
    const char *keys = static_cast<const char *>(args.keys), *values = static_cast<const char *>(args.values);
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        for (int t = 0; t < args.n_tokens; ++t) read_mask(args, state, t, first);
        attend_block(args, state, reinterpret_cast<const block_header *>(keys),
                     reinterpret_cast<const block_header *>(values));
        keys += key_bytes(args.head_qk);
        values += value_bytes(head_v);
    }
    for (int r = 0; r < rows; ++r) {
        const __m512 inverse = _mm512_set1_ps(state.inverse(r));
        float *to = args.out + r / args.group * args.out_token_stride + r % args.group * args.out_head_stride;
        const float *out = state.out + static_cast<int64_t>(r) * head_v;
        for (int i = 0; i < head_v; i += 16) {
            _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_load_ps(out + i), inverse));
        }
    }
}

}  // namespace

namespace isa::avx512vnni {

const attention_kernel attention = {key_bytes, value_bytes, scratch_bytes,   pack_keys, pack_values,
                                    attend,    f16_to_f32,  softmax_weights, &few};

}  // namespace isa::avx512vnni

}  // namespace agq
