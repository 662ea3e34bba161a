// Attention in binary32, for all instruction sets without a better kernel.
//
// Running softmax over blocks of 64 keys ("Online normalizer calculation for softmax", Milakov and Gimelshein, 2018;
// FlashAttention, Dao et al., 2022): compute the scores of a block, the new maximum of each row, and the exponentials;
// then scale the previous output down to the new maximum and add the block's values. A few rows at a time go through
// all steps, so that scores stay in L1. Both products use tiles of 6 rows in registers.
#include "kernels/isa.h"
#include "kernels/portable/score_rows.h"

namespace agq {
namespace {

// Packed keys are [head_qk][64], packed values [64][head_v].

constexpr int64_t rows_at_a_time = 24;  ///< that go through all steps of a block

inline size_t round_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

size_t key_bytes(int head_qk) {
    return static_cast<size_t>(head_qk) * attention_keys * sizeof(float);
}

size_t value_bytes(int head_v) {
    return static_cast<size_t>(head_v) * attention_keys * sizeof(float);
}

/// Scores of rows_at_a_time rows; outputs and masks of all rows, and two numbers per row.
size_t scratch_bytes(int, int head_v) {
    const size_t row = static_cast<size_t>(head_v) + attention_keys + 2;
    return round_up(sizeof(float) * (attention_keys * rows_at_a_time + attention_row_limit * row));
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
    float *scores = static_cast<float *>(args.scratch), *out = scores + rows_at_a_time * attention_keys,
          *masks = out + rows * head_v, *maximum = masks + args.n_tokens * attention_keys, *sum = maximum + rows;
    std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows * head_v));
    for (int r = 0; r < rows; ++r) {
        maximum[r] = args.sinks ? args.sinks[r % args.group] : -INFINITY;
        sum[r] = args.sinks ? 1.0f : 0.0f;
    }
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        const auto [begin, end] = read_masks(args, first, masks);
        const float *k = keys + first * args.head_qk, *v = values + first * head_v;
        const int64_t last = static_cast<int64_t>(end) * args.group;
        for (int64_t r = static_cast<int64_t>(begin) * args.group; r < last; r += rows_at_a_time) {
            const int64_t n = last - r < rows_at_a_time ? last - r : rows_at_a_time;
            multiply<false>(args.q + r * args.head_qk, args.head_qk, k, attention_keys, scores, attention_keys, n,
                            args.head_qk, attention_keys);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t row = r + i;
                const float scale = weigh(scores + i * attention_keys, masks + row / args.group * attention_keys,
                                          args.slopes[row % args.group], args.soft_cap, maximum + row, sum + row);
                if (scale == 1) continue;
                for (int64_t d = 0; d < head_v; d += AGQ_VECTOR)
                    store(out + row * head_v + d, load(out + row * head_v + d) * scale);
            }
            multiply<true>(scores, attention_keys, v, head_v, out + r * head_v, head_v, n, attention_keys, head_v);
        }
    }
    for (int r = 0; r < rows; ++r) {
        const vec inverse = splat(sum[r] == 0 ? 0.0f : 1.0f / sum[r]);
        float *to = args.out + r / args.group * args.out_token_stride + r % args.group * args.out_head_stride;
        for (int64_t i = 0; i < head_v; i += AGQ_VECTOR) store(to + i, load(out + r * head_v + i) * inverse);
    }
}

}  // namespace

namespace isa::AGQ_ISA {

const attention_kernel attention = {key_bytes, value_bytes, scratch_bytes,   pack_keys, pack_values,
                                    attend,    f16_to_f32,  softmax_weights, &few};

}  // namespace isa::AGQ_ISA
}  // namespace agq
