// NEON with SDOT (Armv8.2 FEAT_DotProd): 16 products per instruction.
//
// 8 rows x 6 tokens take 12 integer accumulators and 12 float sums. That leaves 8 registers for operands, so inside a
// panel only operands are loaded.
#include "kernels/arm/neon_dot.h"

namespace agq {
namespace {

struct dotprod {
    static constexpr int nr = 6;

    struct ready {
        /// [rows 0..7 or 8..15][group][chunk]: rows 0..3 and 4..7 of columns 0..3, then of columns 4..7
        alignas(64) int8_t u[2][ready_capacity][8][4][16];
        alignas(64) float d[ready_capacity][panel_rows];

        void fill(const tile *panel, int groups, int first, int count, int8x16_t codebook) {
            int8_t *to[2] = {u[0][0][0][0], u[1][0][0][0]};
            for (int g = 0; g < count; g++) {
                const uint8_t *codes = chunks_of(panel, groups, first + g)[0];
                AGQ_UNROLL
                for (int c = 0; c < 8; c++) {
                    const chunk values = look_up(codes, codebook);
                    AGQ_UNROLL
                    for (int i = 0; i < 2; i++) {
                        const int8x16x4_t rows = {
                            {values.low[2 * i], values.low[2 * i + 1], values.high[2 * i], values.high[2 * i + 1]}};
                        vst1q_s8_x4(to[i], rows);
                        advance(to[i], sizeof rows);
                    }
                }
                const float32x4x4_t scales = row_scales(panel, groups, first + g);
                AGQ_UNROLL
                for (int i = 0; i < 4; i++) vst1q_f32(d[g] + 4 * i, scales.val[i]);
            }
        }
    };

    /// Sums of a block: [token][row].
    static constexpr int half_sums = 8;

    /// Rows 8 half .. 8 half + 7 of a panel times n tokens.
    template <int n, bool per_group>
    static void add_half(const ready &w, int half, int groups, const int8_t *q, const float *scale, float *sums) {
        float32x4_t sum[n][2];
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            AGQ_UNROLL
            for (int i = 0; i < 2; i++) sum[t][i] = vld1q_f32(sums + 16 * t + 4 * i);
        }
        const int8_t *u = w.u[half][0][0][0];
        for (int g = 0; g < groups; g++) {
            int32x4_t acc[n][2];
            AGQ_UNROLL
            for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = vdupq_n_s32(0);
            AGQ_UNROLL
            for (int c = 0; c < 8; c++) {
                int8x16_t rows[4];
                load<4>(u, rows);
                const columns8<n> x(q);
                AGQ_UNROLL
                for (int high = 0; high < 2; high++) {
                    AGQ_UNROLL
                    for (int t = 0; t < n; t++) {
                        acc[t][0] = dot(acc[t][0], rows[2 * high], x.x[t / 2], t % 2 * 2 + high);
                        acc[t][1] = dot(acc[t][1], rows[2 * high + 1], x.x[t / 2], t % 2 * 2 + high);
                    }
                }
            }
            const float32x4_t d[2] = {vld1q_f32(w.d[g] + 8 * half), vld1q_f32(w.d[g] + 8 * half + 4)};
            AGQ_UNROLL
            for (int t = 0; t < n; t++) {
                AGQ_UNROLL
                for (int i = 0; i < 2; i++) {
                    float32x4_t product = vcvtq_f32_s32(acc[t][i]);
                    if (per_group) product = vmulq_n_f32(product, scale[t]);
                    sum[t][i] = vfmaq_f32(sum[t][i], product, d[i]);
                }
            }
            if (per_group) scale += n;
        }
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            AGQ_UNROLL
            for (int i = 0; i < 2; i++) vst1q_f32(sums + 16 * t + 4 * i, sum[t][i]);
        }
    }

    static void add(const gemm_args &args, int begin, int end, const ready &w, int first, int groups, float *sums) {
        add_halves<dotprod>(args, begin, end, w, first, groups, sums);
    }

    static bool stream(const gemm_args &args, const tile *w, const activation_block &block, float *sums) {
        using function = void (*)(const tile *, int, int8x16_t, const int8_t *, const float *, float *);
        static constexpr function table[2][2] = {{stream_dot<1, false>, stream_dot<2, false>},
                                                 {stream_dot<1, true>, stream_dot<2, true>}};
        if (block.n > 2) return false;
        table[args.per_group][block.n - 1](w, args.k / group_columns, load_codebook(args.codebook), block.q,
                                           block.scale, sums);
        return true;
    }

    static void store(const gemm_args &args, const activation_block &block, int b, int panel, const float *sums) {
        store_rows<nr>(args, block, b, panel, sums);
    }
};

bool supported() {
    return detect_arm().dotprod;
}

}  // namespace

const kernel kernel_neon_dotprod = {"neon_dotprod",
                                    supported,
                                    dotprod::nr,
                                    1,
                                    quantize_block<quantize_ops<8>, 8>,
                                    multiply<dotprod>,
                                    AGQ_ATTENTION(isa::neon::attention),
                                    8};

}  // namespace agq
