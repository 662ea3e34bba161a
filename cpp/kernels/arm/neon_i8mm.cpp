// NEON with SMMLA (FEAT_I8MM): 2 rows x 8 columns times 8 columns x 2 tokens, 32 products per instruction.
//
// Two operands of the file, columns 0..3 and 4..7 of the same 4 rows, interleave to two of SMMLA's:
//
//   low  r0 0..3 | r1 0..3 | r2 0..3 | r3 0..3      first   r0 0..3  r0 4..7 | r1 0..3  r1 4..7
//   high r0 4..7 | r1 4..7 | r2 4..7 | r3 4..7      second  r2 0..3  r2 4..7 | r3 0..3  r3 4..7
//
// ST2 stores them in this order, once for all tokens that share a look-up. 4 pairs of rows x 3 pairs of tokens take 12
// integer accumulators and 12 float sums. A single token uses SDOT, which needs no pairs.
#include "kernels/arm/neon_dot.h"

namespace agq {
namespace {

struct i8mm {
    static constexpr int nr = 6;

    struct ready {
        /// [rows 0..7 or 8..15][group][chunk][pair of rows]: 8 columns of one row, then of the other
        alignas(64) int8_t u[2][ready_capacity][8][4][16];
        /// [rows 0..7 or 8..15][group][pair of rows]: the two scales, twice, in the order of a product's result
        alignas(64) float d[2][ready_capacity][4][4];

        void fill(const tile *panel, int groups, int first, int count, int8x16_t codebook) {
            int8_t *to[2] = {u[0][0][0][0], u[1][0][0][0]};
            for (int g = 0; g < count; g++) {
                const uint8_t *codes = chunks_of(panel, groups, first + g)[0];
                AGQ_UNROLL
                for (int c = 0; c < 8; c++) {
                    const chunk values = look_up(codes, codebook);
                    AGQ_UNROLL
                    for (int i = 0; i < 4; i++) {
                        // Stores low and high interleaved: two pairs of rows.
                        const int32x4x2_t rows = {
                            {vreinterpretq_s32_s8(values.low[i]), vreinterpretq_s32_s8(values.high[i])}};
                        vst2q_s32(reinterpret_cast<int32_t *>(to[i / 2]), rows);
                        advance(to[i / 2], sizeof rows);
                    }
                }
                const float32x4x4_t scales = row_scales(panel, groups, first + g);
                AGQ_UNROLL
                for (int i = 0; i < 4; i++) {
                    const float32x2_t first_pair = vget_low_f32(scales.val[i]);
                    const float32x2_t second_pair = vget_high_f32(scales.val[i]);
                    vst1q_f32(d[i / 2][g][i % 2 * 2], vcombine_f32(first_pair, first_pair));
                    vst1q_f32(d[i / 2][g][i % 2 * 2 + 1], vcombine_f32(second_pair, second_pair));
                }
            }
        }
    };

    /// Sums of a block: [rows 0..7 or 8..15][pair of rows][pair of tokens][token][row].
    static constexpr int half_sums = 4 * nr / 2 * 4;
    static float *sums_at(float *half, int rows, int tokens) { return half + (rows * (nr / 2) + tokens) * 4; }
    static const float *sums_at(const float *half, int rows, int tokens) {
        return half + (rows * (nr / 2) + tokens) * 4;
    }

    /// Adds D * I of one group of half a panel, 4 pairs of rows, to the sums of n tokens; advances to the next group.
    /// If n is odd, the last pair is padded with zeros.
    template <int n, bool per_group>
    static AGQ_INLINE void add_group(const int8_t *&u, const float *&d_next, const int8_t *&q, const float *&scale,
                                     float32x4_t sum[4][(n + 1) / 2]) {
        constexpr int pairs = (n + 1) / 2;
        int32x4_t acc[4][pairs];
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            AGQ_UNROLL
            for (int p = 0; p < pairs; p++) acc[i][p] = vdupq_n_s32(0);
        }
        AGQ_UNROLL
        for (int c = 0; c < 8; c++) {
            int8x16_t rows[4];
            load<4>(u, rows);
            const columns8<n> x(q);
            AGQ_UNROLL
            for (int i = 0; i < 4; i++) {
                AGQ_UNROLL
                for (int p = 0; p < pairs; p++) acc[i][p] = vmmlaq_s32(acc[i][p], x.x[p], rows[i]);
            }
        }
        float32x4_t s[pairs];
        if (per_group) {
            AGQ_UNROLL
            for (int p = 0; p < pairs; p++) {
                s[p] = vcombine_f32(vdup_n_f32(scale[2 * p]), vdup_n_f32(2 * p + 1 < n ? scale[2 * p + 1] : 0.0f));
            }
            scale += n;
        }
        const float32x4x4_t d = vld1q_f32_x4(d_next);
        advance(d_next, 16);
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            AGQ_UNROLL
            for (int p = 0; p < pairs; p++) {
                float32x4_t product = vcvtq_f32_s32(acc[i][p]);
                if (per_group) product = vmulq_f32(product, s[p]);
                sum[i][p] = vfmaq_f32(sum[i][p], product, d.val[i]);
            }
        }
    }

    /// Half a panel times n tokens.
    template <int n, bool per_group>
    static void add_half(const ready &w, int half, int groups, const int8_t *q, const float *scale, float *sums) {
        constexpr int pairs = (n + 1) / 2;
        float32x4_t sum[4][pairs];
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            AGQ_UNROLL
            for (int p = 0; p < pairs; p++) sum[i][p] = vld1q_f32(sums_at(sums, i, p));
        }
        const int8_t *u = w.u[half][0][0][0];
        const float *d_next = w.d[half][0][0];
        for (int g = 0; g < groups; g++) add_group<n, per_group>(u, d_next, q, scale, sum);
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            AGQ_UNROLL
            for (int p = 0; p < pairs; p++) vst1q_f32(sums_at(sums, i, p), sum[i][p]);
        }
    }

    static void add(const gemm_args &args, int begin, int end, const ready &w, int first, int groups, float *sums) {
        add_halves<i8mm>(args, begin, end, w, first, groups, sums);
    }

    static bool stream(const gemm_args &args, const tile *w, const activation_block &block, float *sums) {
        if (block.n > 1) return false;
        const auto function = args.per_group ? stream_dot<1, true> : stream_dot<1, false>;
        float rows[panel_rows];
        function(w, args.k / group_columns, load_codebook(args.codebook), block.q, block.scale, rows);
        for (int r = 0; r < panel_rows; r++) sums_at(sums + half_sums * (r / 8), r % 8 / 2, 0)[r % 2] = rows[r];
        return true;
    }

    static void store(const gemm_args &args, const activation_block &block, int b, int panel, const float *sums) {
        for (int t = 0; t < block.n; t += 2) {
            float *first = args.dst[b * nr + t] + panel * panel_rows;
            const float first_factor = final_factor(args, block, t);
            const bool two = t + 1 < block.n;
            float *second = two ? args.dst[b * nr + t + 1] + panel * panel_rows : nullptr;
            const float second_factor = two ? final_factor(args, block, t + 1) : 0.0f;
            AGQ_UNROLL
            for (int i = 0; i < 4; i++) {  // 4 rows: two pairs
                const float *half = sums + half_sums * (i / 2);
                const float64x2_t low = vreinterpretq_f64_f32(vld1q_f32(sums_at(half, i % 2 * 2, t / 2)));
                const float64x2_t high = vreinterpretq_f64_f32(vld1q_f32(sums_at(half, i % 2 * 2 + 1, t / 2)));
                vst1q_f32(first + 4 * i, vmulq_n_f32(vreinterpretq_f32_f64(vzip1q_f64(low, high)), first_factor));
                if (two) {
                    const float32x4_t rows = vreinterpretq_f32_f64(vzip2q_f64(low, high));
                    vst1q_f32(second + 4 * i, vmulq_n_f32(rows, second_factor));
                }
            }
        }
    }
};

bool supported() {
    return detect_arm().dotprod && detect_arm().i8mm;
}

}  // namespace

const kernel kernel_neon_i8mm = {"neon_i8mm",
                                 supported,
                                 i8mm::nr,
                                 1,
                                 quantize_block<quantize_ops<8>, 8>,
                                 multiply<i8mm>,
                                 AGQ_ATTENTION(isa::neon::attention),
                                 8};

}  // namespace agq
