// Internal to the Arm kernels with SDOT: products of 4 rows x 4 columns with 4 activations of one token, directly in
// the file's order. Packed activations hold 8 columns of a token together: two operands of 4.
#pragma once

#include "kernels/arm/neon_kernel.h"

namespace agq {
namespace {

/// sum + the four rows of `u` times activations 4 * four .. 4 * four + 3 of `x`.
inline int32x4_t dot(int32x4_t sum, int8x16_t u, int8x16_t x, int four) {
    // After unrolling, `four` is known at compile time, but the intrinsic needs a constant.
    switch (four) {
        case 0:
            return vdotq_laneq_s32(sum, u, x, 0);
        case 1:
            return vdotq_laneq_s32(sum, u, x, 1);
        case 2:
            return vdotq_laneq_s32(sum, u, x, 2);
        default:
            return vdotq_laneq_s32(sum, u, x, 3);
    }
}

/// The next 8 columns of all n tokens: tokens 2 i and 2 i + 1 are x[i]. If n is odd, the last half is zero.
template <int n>
struct columns8 {
    int8x16_t x[(n + 1) / 2];

    explicit columns8(const int8_t *&q) {
        load<n / 2>(q, x);
        if (n % 2 == 0) return;
        x[n / 2] = vcombine_s8(vld1_s8(q), vdup_n_s8(0));
        advance(q, 8);
    }
};

/// Adds D * I of one group, directly in the file's order, to the sums of n tokens; advances to the next group.
template <int n, bool per_group, class function>
AGQ_INLINE void stream_step(const uint8_t *codes, const function &scales, int8x16_t codebook, const int8_t *&q,
                            const float *&scale, float32x4_t sum[n][4]) {
    int32x4_t acc[n][4];
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) acc[t][i] = vdupq_n_s32(0);
    }
    AGQ_UNROLL
    for (int c = 0; c < 8; c++) {
        const chunk u = look_up(codes, codebook);
        const columns8<n> x(q);
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            AGQ_UNROLL
            for (int i = 0; i < 4; i++) {
                acc[t][i] = dot(acc[t][i], u.low[i], x.x[t / 2], t % 2 * 2);
                acc[t][i] = dot(acc[t][i], u.high[i], x.x[t / 2], t % 2 * 2 + 1);
            }
        }
    }
    const float32x4x4_t d = scales();
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            float32x4_t product = vcvtq_f32_s32(acc[t][i]);
            if (per_group) product = vmulq_n_f32(product, scale[t]);
            sum[t][i] = vfmaq_f32(sum[t][i], product, d.val[i]);
        }
    }
    if (per_group) scale += n;
}

/// One panel, directly in the file's order, times n tokens; adds to sums[t][row].
template <int n, bool per_group>
void stream_dot(const tile *w, int groups, int8x16_t codebook, const int8_t *q, const float *scale, float *sums) {
    float32x4_t sum[n][4];
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) sum[t][i] = vdupq_n_f32(0);
    }
    for (int g = 0; g < groups / 2 * 2; g++) {
        const auto scales = [=] { return row_scales(w[g / 2], g % 2); };
        stream_step<n, per_group>(w[g / 2].codes[8 * (g % 2)], scales, codebook, q, scale, sum);
    }
    if (groups % 2 == 1) {
        const half_tile &last = last_half(w, groups);
        stream_step<n, per_group>(last.codes[0], [&last] { return row_scales(last); }, codebook, q, scale, sum);
    }
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) vst1q_f32(sums + 16 * t + 4 * i, sum[t][i]);
    }
}

/// Whole blocks of n tokens times a panel that policy::ready has looked up: policy::add_half for rows 0..7 and 8..15,
/// whose sums in a block are policy::half_sums apart.
template <class policy, int n, bool per_group>
void add_blocks(const typename policy::ready &w, int groups, const group_operands &x, float *sums) {
    for (int b = 0; b < x.blocks; b++) {
        const int8_t *q = x.q + b * x.q_step;
        const float *scale = x.scale + b * x.scale_step;
        for (int half = 0; half < 2; half++) {
            policy::template add_half<n, per_group>(w, half, groups, q, scale, sums + policy::half_sums * half);
        }
        sums += policy::nr * panel_rows;
    }
}

/// add_blocks() for blocks begin .. end - 1, which have the same number of tokens, and `groups` groups from `first`.
template <class policy>
void add_halves(const gemm_args &args, int begin, int end, const typename policy::ready &w, int first, int groups,
                float *sums) {
    static_assert(policy::nr == 6, "the table has 6 columns");
    using function = void (*)(const typename policy::ready &, int, const group_operands &, float *);
    static constexpr function table[2][policy::nr] = {
        {add_blocks<policy, 1, false>, add_blocks<policy, 2, false>, add_blocks<policy, 3, false>,
         add_blocks<policy, 4, false>, add_blocks<policy, 5, false>, add_blocks<policy, 6, false>},
        {add_blocks<policy, 1, true>, add_blocks<policy, 2, true>, add_blocks<policy, 3, true>,
         add_blocks<policy, 4, true>, add_blocks<policy, 5, true>, add_blocks<policy, 6, true>}};
    const int n = block_at<policy::nr>(args, begin).n;
    table[args.per_group][n - 1](w, groups, operands_at<policy::nr>(args, begin, end, first), sums);
}

}  // namespace
}  // namespace agq
