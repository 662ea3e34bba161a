// Attention quantized as in Agile-Quant (AGQ_ATTENTION=paper, docs/paper-attention.md): queries, keys and values in 8
// bits, softmax on a logarithmic grid of 4 bits. It is an experiment about quality, for any CPU; it is not optimized
// for speed.
//
// The integers are stored as binary32. Codes are at most 127 and vectors have at most 1024 of them, so products of
// queries and keys stay below 2^24 and are exact in any order. Weights are powers of two, which need the sum of the
// whole row. So there are two passes over the keys: one for maxima and sums, one for weights and values.
#include "kernels/isa.h"
#include "kernels/portable/score_rows.h"

namespace agq {
namespace {

static_assert(127 * 127 * attention_head_limit < 1 << 24, "sums of products must be exact in binary32");

constexpr float log2_e = 1.44269504f;
constexpr float zero_code = 15;  ///< stands for weight zero; 0 to 14 stand for powers of 1/2

/// The nearest integer, for numbers below 2^22. Without SSE4.1, std::nearbyint would be a library call.
inline float nearest(float x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23
    return (x + magic) - magic;
}

/// Rounds a vector to codes in -127..127 and returns their scale. If a number is not finite, the codes and all that
/// depends on them become NaN.
float quantize_vector(const float *x, int n, float *codes, int64_t stride) {
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        finite = finite && std::isfinite(x[i]);
    }
    const float scale = finite ? largest / 127 : NAN;
    for (int i = 0; i < n; ++i) codes[i * stride] = scale == 0 ? 0.0f : nearest(x[i] / scale);
    return scale;
}

// A packed block of keys is [head_qk][64] codes and [64] scales, one of values [64][head_v] codes and [64] scales.

size_t block_bytes(int width) {
    return (static_cast<size_t>(width) + 1) * attention_keys * sizeof(float);
}

/// Sizes of the parts of a row_state.
size_t scratch_bytes(int head_qk, int head_v) {
    const size_t row = static_cast<size_t>(head_qk) + static_cast<size_t>(head_v) + 2 * attention_keys + 4;
    return (sizeof(float) * attention_row_limit * row + 63) / 64 * 64;
}

void pack_keys(const float *rows, int n, int head_qk, void *packed) {
    float *to = static_cast<float *>(packed), *scales = to + static_cast<int64_t>(head_qk) * attention_keys;
    std::memset(packed, 0, block_bytes(head_qk));
    for (int i = 0; i < n; ++i) {
        scales[i] = quantize_vector(rows + static_cast<int64_t>(i) * head_qk, head_qk, to + i, attention_keys);
    }
}

void pack_values(const float *rows, int n, int head_v, void *packed) {
    float *to = static_cast<float *>(packed), *scales = to + static_cast<int64_t>(head_v) * attention_keys;
    std::memset(packed, 0, block_bytes(head_v));
    for (int i = 0; i < n; ++i) {
        const int64_t at = static_cast<int64_t>(i) * head_v;
        scales[i] = quantize_vector(rows + at, head_v, to + at, 1);
    }
}

/// State of the rows of a call, in its scratch memory.
struct row_state {
    float *codes, *out, *scores, *masks;
    float *scales;   ///< of the codes
    float *maximum;  ///< of the scores
    float *log_sum;  ///< sum of e^(score - maximum); at the end, its base-2 logarithm
    float *rounded;  ///< sum of the rounded weights

    explicit row_state(const attention_args &args) {
        const int64_t rows = static_cast<int64_t>(args.n_tokens) * args.group;
        codes = static_cast<float *>(args.scratch);
        out = codes + rows * args.head_qk;
        scores = out + rows * args.head_v;
        masks = scores + rows * attention_keys;
        scales = masks + rows * attention_keys;
        maximum = scales + rows;
        log_sum = maximum + rows;
        rounded = log_sum + rows;
    }
};

/// A range of the rows of a call.
struct row_range {
    int64_t begin, end;
};

/// Computes the scores of a block and updates `maximum`. Returns the rows that see part of the block.
row_range score_block(const attention_args &args, const row_state &state, int64_t first, float *maximum) {
    const token_range seen = read_masks(args, first, state.masks);
    const row_range rows = {static_cast<int64_t>(seen.begin) * args.group, static_cast<int64_t>(seen.end) * args.group};
    if (rows.begin >= rows.end) return rows;
    const float *keys = static_cast<const float *>(args.keys) +
                        first / attention_keys * static_cast<int64_t>(block_bytes(args.head_qk) / sizeof(float));
    const float *key_scales = keys + static_cast<int64_t>(args.head_qk) * attention_keys;
    multiply<false>(state.codes + rows.begin * args.head_qk, args.head_qk, keys, attention_keys,
                    state.scores + rows.begin * attention_keys, attention_keys, rows.end - rows.begin, args.head_qk,
                    attention_keys);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        float *scores = state.scores + r * attention_keys;
        for (int j = 0; j < attention_keys; j += AGQ_VECTOR) {
            store(scores + j, load(scores + j) * (state.scales[r] * load(key_scales + j)));
        }
        maximum[r] = finish_scores(scores, state.masks + r / args.group * attention_keys, args.slopes[r % args.group],
                                   args.soft_cap, maximum[r]);
    }
    return rows;
}

/// Adds e^(score - top) of a block to a sum that was relative to `before`.
void add_exponentials(const float *scores, float before, float top, float *sum) {
    const float reference = top == -INFINITY ? 0.0f : top;  // while all keys are hidden
    vec total{};
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) total += exponential(load(scores + j) - reference);
    float added = 0;
    for (int i = 0; i < AGQ_VECTOR; ++i) added += total[i];
    *sum = *sum * (before == -INFINITY ? 0.0f : std::exp(before - top)) + added;
}

/// Turns scores into weights 2^-code, multiplied by the scales of the values. The code is the rounded -log2 of the
/// softmax. Returns the sum of the weights.
float weigh(float *scores, float maximum, float log_sum, const float *value_scales) {
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23 leaves the nearest integer in the low bits of a sum
    vec total{};
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) {
        const vec bits = (maximum - load(scores + j)) * log2_e + log_sum;
        const vec code = (bits > zero_code ? splat(zero_code) : bits) + magic;
        const ivec power = (127 - (reinterpret_cast<const ivec &>(code) & 0xFF)) << 23;
        vec weight = code - magic >= zero_code ? vec{} : reinterpret_cast<const vec &>(power);
        weight = bits != bits ? bits : weight;
        total += weight;
        store(scores + j, weight * load(value_scales + j));
    }
    float sum = 0;
    for (int i = 0; i < AGQ_VECTOR; ++i) sum += total[i];
    return sum;
}

void find_sums(const attention_args &args, const row_state &state, float *previous) {
    const int64_t rows = static_cast<int64_t>(args.n_tokens) * args.group;
    for (int64_t r = 0; r < rows; ++r) {
        state.maximum[r] = args.sinks ? args.sinks[r % args.group] : -INFINITY;
        state.log_sum[r] = args.sinks ? 1.0f : 0.0f;
    }
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        std::memcpy(previous, state.maximum, sizeof(float) * static_cast<size_t>(rows));
        const row_range seen = score_block(args, state, first, state.maximum);
        for (int64_t r = seen.begin; r < seen.end; ++r) {
            add_exponentials(state.scores + r * attention_keys, previous[r], state.maximum[r], state.log_sum + r);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        float &sum = state.log_sum[r];
        if (state.maximum[r] == -INFINITY) {
            // All keys are hidden, or the scores are NaN.
            state.maximum[r] = 0;
            sum = sum == 0 ? INFINITY : NAN;
        } else {
            sum = std::log2(sum);
        }
    }
}

/// `Normalized` divides the output by the sum of the rounded weights; the paper does not.
template <bool Normalized>
void attend(const attention_args &args) {
    const int64_t rows = static_cast<int64_t>(args.n_tokens) * args.group, head_qk = args.head_qk, head_v = args.head_v;
    const row_state state(args);
    for (int64_t r = 0; r < rows; ++r) {
        state.scales[r] = quantize_vector(args.q + r * head_qk, args.head_qk, state.codes + r * head_qk, 1);
    }
    find_sums(args, state, state.rounded);
    for (int64_t r = 0; r < rows; ++r) {
        state.rounded[r] = 0;
        if (args.sinks) {
            const float bits = (state.maximum[r] - args.sinks[r % args.group]) * log2_e + state.log_sum[r];
            state.rounded[r] = std::exp2(-nearest(bits < 126 ? bits : 126.0f));
        }
    }
    std::memset(state.out, 0, sizeof(float) * static_cast<size_t>(rows * head_v));
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        float ignored[attention_row_limit] = {};
        const row_range seen = score_block(args, state, first, ignored);
        const float *values = static_cast<const float *>(args.values) +
                              first / attention_keys * static_cast<int64_t>(block_bytes(args.head_v) / sizeof(float));
        const float *value_scales = values + head_v * attention_keys;
        for (int64_t r = seen.begin; r < seen.end; ++r) {
            state.rounded[r] +=
                weigh(state.scores + r * attention_keys, state.maximum[r], state.log_sum[r], value_scales);
        }
        if (seen.begin >= seen.end) continue;
        multiply<true>(state.scores + seen.begin * attention_keys, attention_keys, values, head_v,
                       state.out + seen.begin * head_v, head_v, seen.end - seen.begin, attention_keys, head_v);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const float factor = Normalized && state.rounded[r] != 0 ? 1 / state.rounded[r] : 1.0f;
        const float *from = state.out + r * head_v;
        float *to = args.out + r / args.group * args.out_token_stride + r % args.group * args.out_head_stride;
        for (int64_t i = 0; i < head_v; i += AGQ_VECTOR) store(to + i, load(from + i) * factor);
    }
}

}  // namespace

const attention_kernel attention_paper = {block_bytes, block_bytes,   scratch_bytes, pack_keys,
                                          pack_values, attend<false>, f16_to_f32,    isa::generic::softmax_weights,
                                          nullptr};
const attention_kernel attention_paper_normalized = {
    block_bytes, block_bytes,  scratch_bytes, pack_keys,
    pack_values, attend<true>, f16_to_f32,    isa::generic::softmax_weights,
    nullptr};

}  // namespace agq
