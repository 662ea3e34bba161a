// Plain NEON, for CPUs without dot-product instructions (Cortex-A53, A72): bytes are multiplied to 16 bits, 8 products
// per instruction.
//
// Values u - 64 are at most 64 in size. With 8-bit activations a product is at most 64 * 127 = 8128. So four products
// fit a 16-bit lane, and one widening addition is enough for four multiplications. With 4-bit activations a product is
// at most 64 * 7 = 448. A lane holds 8 products of a group of 64 columns, and even the sum of all 8 lanes, 64 * 448 =
// 28672, is below 2^15. This is the SIMD 4-bit multiplier: nothing but multiplications until the group is complete.
//
// For many tokens, rows are looked up into 16 adjacent columns, so that operands need no broadcast: lane l of a product
// belongs to column l or l + 8 of one (row, token). For one token the file's order is used directly.
#include "kernels/arm/neon_kernel.h"

namespace agq {
namespace {

/// Transposes the four 4-column parts of four rows to four rows of 16 columns.
inline int8x16x4_t transpose(int8x16_t part0, int8x16_t part1, int8x16_t part2, int8x16_t part3) {
    const int32x4_t a = vreinterpretq_s32_s8(part0), b = vreinterpretq_s32_s8(part1);
    const int32x4_t c = vreinterpretq_s32_s8(part2), d = vreinterpretq_s32_s8(part3);
    const int64x2_t ab_even = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), ab_odd = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t cd_even = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), cd_odd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    return {{vreinterpretq_s8_s64(vtrn1q_s64(ab_even, cd_even)), vreinterpretq_s8_s64(vtrn1q_s64(ab_odd, cd_odd)),
             vreinterpretq_s8_s64(vtrn2q_s64(ab_even, cd_even)), vreinterpretq_s8_s64(vtrn2q_s64(ab_odd, cd_odd))}};
}

/// The 16 products of `u` and `x`, added in pairs: two per lane.
inline int16x8_t multiply16(int8x16_t u, int8x16_t x) {
    return vmlal_high_s8(vmull_s8(vget_low_s8(u), vget_low_s8(x)), u, x);
}
inline int16x8_t multiply16(int16x8_t sum, int8x16_t u, int8x16_t x) {
    return vmlal_high_s8(vmlal_s8(sum, vget_low_s8(u), vget_low_s8(x)), u, x);
}

/// The sums over all lanes of each of four rows of 16-bit integers. Only for `bits` 4: pairwise sums must fit 16 bits.
inline int32x4_t add_lanes(const int16x8_t row[4]) {
    return vpaddlq_s16(vpaddq_s16(vpaddq_s16(row[0], row[1]), vpaddq_s16(row[2], row[3])));
}
inline int32x4_t add_lanes(const int32x4_t row[4]) {
    return vpaddq_s32(vpaddq_s32(row[0], row[1]), vpaddq_s32(row[2], row[3]));
}

struct neon {
    static constexpr int nr = 4;

    struct ready {
        /// [four rows][group][16 columns][row][column]
        alignas(64) int8_t u[4][ready_capacity][4][4][16];
        alignas(64) float d[ready_capacity][panel_rows];

        void fill(const tile *panel, int groups, int first, int count, int8x16_t codebook) {
            int8_t *to[4] = {u[0][0][0][0], u[1][0][0][0], u[2][0][0][0], u[3][0][0][0]};
            for (int g = 0; g < count; g++) {
                const uint8_t *codes = chunks_of(panel, groups, first + g)[0];
                AGQ_UNROLL
                for (int c = 0; c < 4; c++) {
                    const chunk left = look_up(codes, codebook), right = look_up(codes, codebook);
                    AGQ_UNROLL
                    for (int i = 0; i < 4; i++) {
                        vst1q_s8_x4(to[i], transpose(left.low[i], left.high[i], right.low[i], right.high[i]));
                        advance(to[i], 64);
                    }
                }
                const float32x4x4_t scales = row_scales(panel, groups, first + g);
                AGQ_UNROLL
                for (int i = 0; i < 4; i++) vst1q_f32(d[g] + 4 * i, scales.val[i]);
            }
        }
    };

    /// Integer sums of four rows and n tokens over one group, for 8-bit activations; advances to the next group.
    template <int n>
    static void sum_group8(const int8_t *&u, const int8_t *&q, int32x4_t result[n]) {
        int32x4_t acc[n][4];
        AGQ_UNROLL
        for (int part = 0; part < 2; part++) {
            int8x16_t x0[n], x1[n];
            AGQ_UNROLL
            for (int t = 0; t < n; t++) x0[t] = vld1q_s8(q + 16 * t), x1[t] = vld1q_s8(q + 16 * (n + t));
            AGQ_UNROLL
            for (int r = 0; r < 4; r += 2) {
                // Single loads, which the compiler pairs. All registers are in use, and loads of four need consecutive
                // registers.
                const int8x16_t u0[2] = {vld1q_s8(u + 16 * r), vld1q_s8(u + 16 * r + 16)};
                const int8x16_t u1[2] = {vld1q_s8(u + 16 * r + 64), vld1q_s8(u + 16 * r + 80)};
                AGQ_UNROLL
                for (int i = 0; i < 2; i++) {
                    AGQ_UNROLL
                    for (int t = 0; t < n; t++) {
                        const int16x8_t four = multiply16(multiply16(u0[i], x0[t]), u1[i], x1[t]);
                        acc[t][r + i] = part == 0 ? vpaddlq_s16(four) : vpadalq_s16(acc[t][r + i], four);
                    }
                }
            }
            u += 128;
            q += 32 * n;
        }
        AGQ_UNROLL
        for (int t = 0; t < n; t++) result[t] = add_lanes(acc[t]);
    }

    /// The same for 4-bit activations.
    template <int n>
    static void sum_group4(const int8_t *&u, const int8_t *&q, int32x4_t result[n]) {
        int16x8_t acc[n][4];
        AGQ_UNROLL
        for (int part = 0; part < 4; part++) {
            int8x16_t rows[4], x[n];
            load<4>(u, rows);
            load<n>(q, x);
            AGQ_UNROLL
            for (int r = 0; r < 4; r++) {
                AGQ_UNROLL
                for (int t = 0; t < n; t++) {
                    acc[t][r] = part == 0 ? multiply16(rows[r], x[t]) : multiply16(acc[t][r], rows[r], x[t]);
                }
            }
        }
        AGQ_UNROLL
        for (int t = 0; t < n; t++) result[t] = add_lanes(acc[t]);
    }

    /// Rows 4 i .. 4 i + 3 of a panel times n tokens.
    template <int bits, int n, bool per_group>
    static void add_rows(const ready &w, int i, int groups, const int8_t *q, const float *scale, float *sums) {
        float32x4_t sum[n];
        AGQ_UNROLL
        for (int t = 0; t < n; t++) sum[t] = vld1q_f32(sums + 16 * t);
        const int8_t *u = w.u[i][0][0][0];
        for (int g = 0; g < groups; g++) {
            int32x4_t integers[n];
            if (bits == 4) {
                sum_group4<n>(u, q, integers);
            } else {
                sum_group8<n>(u, q, integers);
            }
            const float32x4_t d = vld1q_f32(w.d[g] + 4 * i);
            AGQ_UNROLL
            for (int t = 0; t < n; t++) {
                float32x4_t product = vcvtq_f32_s32(integers[t]);
                if (per_group) product = vmulq_n_f32(product, scale[t]);
                sum[t] = vfmaq_f32(sum[t], product, d);
            }
            if (per_group) scale += n;
        }
        AGQ_UNROLL
        for (int t = 0; t < n; t++) vst1q_f32(sums + 16 * t, sum[t]);
    }

    template <int bits, int n, bool per_group>
    static void add_blocks(const ready &w, int groups, const group_operands &x, float *sums) {
        for (int b = 0; b < x.blocks; b++) {
            const int8_t *q = x.q + b * x.q_step;
            const float *scale = x.scale + b * x.scale_step;
            for (int i = 0; i < 4; i++) add_rows<bits, n, per_group>(w, i, groups, q, scale, sums + 4 * i);
            sums += nr * panel_rows;
        }
    }

    static void add(const gemm_args &args, int begin, int end, const ready &w, int first, int groups, float *sums) {
        using function = void (*)(const ready &, int, const group_operands &, float *);
        static constexpr function table[2][2][nr] = {
            {{add_blocks<8, 1, false>, add_blocks<8, 2, false>, add_blocks<8, 3, false>, add_blocks<8, 4, false>},
             {add_blocks<8, 1, true>, add_blocks<8, 2, true>, add_blocks<8, 3, true>, add_blocks<8, 4, true>}},
            {{add_blocks<4, 1, false>, add_blocks<4, 2, false>, add_blocks<4, 3, false>, add_blocks<4, 4, false>},
             {add_blocks<4, 1, true>, add_blocks<4, 2, true>, add_blocks<4, 3, true>, add_blocks<4, 4, true>}}};
        const int n = block_at<nr>(args, begin).n;
        table[args.bits == 4][args.per_group][n - 1](w, groups, operands_at<nr>(args, begin, end, first), sums);
    }

    /// Integer sums of one token and 16 rows over one group, directly in the file's order: 4 columns of two rows, side
    /// by side, are multiplied with the same 4 activations, duplicated.
    template <int bits>
    static void stream_group(const uint8_t *codes, int8x16_t codebook, const int8_t *q, int32x4_t result[4]) {
        int16x8_t narrow[4][2];  // two rows each
        int32x4_t wide[4][2];
        AGQ_UNROLL
        for (int c = 0; c < 8; c++) {
            const int32x4_t x = vreinterpretq_s32_s8(vld1q_s8(q + c / 2 * 16));
            const int8x16_t x0 = vreinterpretq_s8_s32(c % 2 == 0 ? vdupq_laneq_s32(x, 0) : vdupq_laneq_s32(x, 2));
            const int8x16_t x1 = vreinterpretq_s8_s32(c % 2 == 0 ? vdupq_laneq_s32(x, 1) : vdupq_laneq_s32(x, 3));
            const bool first = bits == 8 ? c % 2 == 0 : c == 0;
            const chunk u = look_up(codes, codebook);
            AGQ_UNROLL
            for (int i = 0; i < 4; i++) {
                const int8x16_t low = u.low[i], high = u.high[i];
                int16x8_t *sum = narrow[i];
                sum[0] = first ? vmull_s8(vget_low_s8(low), vget_low_s8(x0))
                               : vmlal_s8(sum[0], vget_low_s8(low), vget_low_s8(x0));
                sum[1] = first ? vmull_high_s8(low, x0) : vmlal_high_s8(sum[1], low, x0);
                sum[0] = vmlal_s8(sum[0], vget_low_s8(high), vget_low_s8(x1));
                sum[1] = vmlal_high_s8(sum[1], high, x1);
                if (bits == 4 || c % 2 == 0) continue;
                AGQ_UNROLL
                for (int p = 0; p < 2; p++) {  // four products per lane
                    wide[i][p] = c == 1 ? vpaddlq_s16(sum[p]) : vpadalq_s16(wide[i][p], sum[p]);
                }
            }
        }
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            result[i] =
                bits == 4 ? vpaddlq_s16(vpaddq_s16(narrow[i][0], narrow[i][1])) : vpaddq_s32(wide[i][0], wide[i][1]);
        }
    }

    /// Adds D * I of one group to the sums of one token.
    template <int bits, bool per_group>
    static AGQ_INLINE void stream_step(const uint8_t *codes, float32x4x4_t d, int8x16_t codebook, const int8_t *q,
                                       const float *scale, float32x4_t sum[4]) {
        int32x4_t integers[4];
        stream_group<bits>(codes, codebook, q, integers);
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            float32x4_t product = vcvtq_f32_s32(integers[i]);
            if (per_group) product = vmulq_n_f32(product, *scale);
            sum[i] = vfmaq_f32(sum[i], product, d.val[i]);
        }
    }

    template <int bits, bool per_group>
    static void stream_rows(const tile *w, int groups, int8x16_t codebook, const int8_t *q, const float *scale,
                            float *sums) {
        float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
        const int in_tiles = groups / 2 * 2;
        for (int g = 0; g < in_tiles; g++) {
            stream_step<bits, per_group>(w[g / 2].codes[8 * (g % 2)], row_scales(w[g / 2], g % 2), codebook,
                                         q + group_columns * g, scale + g, sum);
        }
        if (in_tiles < groups) {
            const half_tile &last = last_half(w, groups);
            stream_step<bits, per_group>(last.codes[0], row_scales(last), codebook, q + group_columns * in_tiles,
                                         scale + in_tiles, sum);
        }
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) vst1q_f32(sums + 4 * i, sum[i]);
    }

    static bool stream(const gemm_args &args, const tile *w, const activation_block &block, float *sums) {
        using function = void (*)(const tile *, int, int8x16_t, const int8_t *, const float *, float *);
        static constexpr function table[2][2] = {{stream_rows<8, false>, stream_rows<8, true>},
                                                 {stream_rows<4, false>, stream_rows<4, true>}};
        if (block.n > 1) return false;
        table[args.bits == 4][args.per_group](w, args.k / group_columns, load_codebook(args.codebook), block.q,
                                              block.scale, sums);
        return true;
    }

    static void store(const gemm_args &args, const activation_block &block, int b, int panel, const float *sums) {
        store_rows<nr>(args, block, b, panel, sums);
    }
};

bool supported() {
    return true;
}

}  // namespace

const kernel kernel_neon = {"neon",
                            supported,
                            neon::nr,
                            1,
                            quantize_block<quantize_ops<16>, 16>,
                            multiply<neon>,
                            AGQ_ATTENTION(isa::neon::attention),
                            16};

}  // namespace agq
