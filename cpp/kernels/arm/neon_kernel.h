// Shared by the Arm kernels: tiles as NEON registers, the loops over panels and token blocks, and the quantizer. Each
// kernel defines its products, and the order of codes that they need.
//
// Arm multiplies signed by signed bytes. So codes are looked up as u - 64 and the sums begin at 0; the bias of the
// packed activations is not used.
//
// Everything is in an anonymous namespace, because each kernel file is compiled with its own flags.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "format/panel.h"
#include "kernels/arm/arm_cpu.h"
#include "kernels/kernel.h"
#include "kernels/portable/unroll.h"
#include "kernels/portable/vector_kernel.h"

namespace agq {

AGQ_DECLARE_ISA(neon)  // the other kernels use its attention, too

namespace {

// loads

/// Advances an address by an amount that the compiler must not see. Loads of several registers take an address without
/// an offset, but can advance it for free. GCC would otherwise compute each address from the first one of its loop.
template <class T>
inline void advance(T *&address, int count) {
    address += count;
#if defined(__GNUC__)
    asm("" : "+r"(address));
#endif
}

/// Loads `count` registers and advances the address past them; one instruction per four registers.
template <int count>
inline void load(const int8_t *&from, int8x16_t *to) {
    if (count >= 4) {
        const int8x16x4_t four = vld1q_s8_x4(from);
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) to[i] = four.val[i];
        advance(from, 64);
        load<(count > 4 ? count - 4 : 0)>(from, to + 4);
    } else if (count == 3) {
        const int8x16x3_t three = vld1q_s8_x3(from);
        AGQ_UNROLL
        for (int i = 0; i < 3; i++) to[i] = three.val[i];
        advance(from, 48);
    } else if (count == 2) {
        const int8x16x2_t two = vld1q_s8_x2(from);
        to[0] = two.val[0];
        to[1] = two.val[1];
        advance(from, 32);
    } else if (count == 1) {
        to[0] = vld1q_s8(from);
        advance(from, 16);
    }
}

// tiles

/// The values u - 64 of one chunk: low[i] is rows 4 i .. 4 i + 3 x columns 0..3 of its 8, high[i] the same rows x
/// columns 4..7.
struct chunk {
    int8x16_t low[4], high[4];
};

inline int8x16_t load_codebook(const uint8_t *codebook) {
    return vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(codebook), vdupq_n_u8(code_offset)));
}

/// Four rows of a chunk.
inline void look_up(uint8x16_t pairs, int8x16_t codebook, int8x16_t *low, int8x16_t *high) {
    *low = vqtbl1q_s8(codebook, vandq_u8(pairs, vdupq_n_u8(15)));
    *high = vqtbl1q_s8(codebook, vshrq_n_u8(pairs, 4));
}

/// The next chunk.
inline chunk look_up(const uint8_t *&codes, int8x16_t codebook) {
    const uint8x16x4_t pairs = vld1q_u8_x4(codes);
    advance(codes, sizeof pairs);
    chunk c;
    AGQ_UNROLL
    for (int i = 0; i < 4; i++) look_up(pairs.val[i], codebook, &c.low[i], &c.high[i]);
    return c;
}

/// The scales D of 16 rows. Each has 12 bits, a high byte and a nibble: a binary16 without its last four bits. The
/// scale's nibble is in the high half of the bytes in `low`.
inline float32x4x4_t join_scales(const uint8_t *scale_hi, uint8x16_t low) {
    const uint8x16_t high = vld1q_u8(scale_hi);
    const float16x8_t first = vreinterpretq_f16_u8(vzip1q_u8(low, high));
    const float16x8_t second = vreinterpretq_f16_u8(vzip2q_u8(low, high));
    return {{vcvt_f32_f16(vget_low_f16(first)), vcvt_high_f32_f16(first), vcvt_f32_f16(vget_low_f16(second)),
             vcvt_high_f32_f16(second)}};
}

inline float32x4x4_t row_scales(const tile &w, int half) {
    const uint8x16_t both = vld1q_u8(w.scale_lo);
    return join_scales(w.scale_hi[half], half == 0 ? vshlq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(0xF0)));
}

inline float32x4x4_t row_scales(const half_tile &w) {
    const uint8x8_t pairs = vld1_u8(w.scale_lo);
    const uint8x8_t even = vshl_n_u8(pairs, 4), odd = vand_u8(pairs, vdup_n_u8(0xF0));
    return join_scales(w.scale_hi, vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd)));
}

inline float32x4x4_t row_scales(const tile *panel, int groups, int g) {
    return is_alone(groups, g) ? row_scales(last_half(panel, groups)) : row_scales(panel[g / 2], g % 2);
}

// panels and blocks

constexpr int shared_blocks = 32;   ///< token blocks that share one look-up
constexpr int ready_capacity = 16;  ///< groups that are looked up at once: 18 KiB, about half of the smallest L1

/// Applies the final factors and stores the results, for sums in the order [token][row].
template <int nr>
inline void store_rows(const gemm_args &args, const activation_block &block, int b, int panel, const float *sums) {
    for (int t = 0; t < block.n; t++) {
        const float factor = final_factor(args, block, t);
        float *out = args.dst[b * nr + t] + panel * panel_rows;
        AGQ_UNROLL
        for (int r = 0; r < panel_rows; r += 4) vst1q_f32(out + r, vmulq_n_f32(vld1q_f32(sums + 16 * t + r), factor));
    }
}

/// The gemm_fn of a kernel. `policy` is what kernels differ in:
///
///   nr                           tokens of a block
///   ready                        groups of a panel that have been looked up, in the order in which they will be used
///       void fill(const tile *panel, int groups, int first, int count, int8x16_t codebook)
///                                              takes some of the panel's groups
///   void add(args, begin, end, ready, first, groups, float *sums)   adds D * I of groups first ... to the sums of the
///                                              blocks from begin to end, which all hold the same number of tokens;
///                                              the policy chooses the order of a block's sums, [nr * 16]
///   bool stream(args, panel, block, sums)      all groups directly in the file's order, for blocks too small to gain
///                                              from looking up first; returns false for larger blocks
///   void store(args, block, b, panel, sums)
///
/// The outer loop is over tokens: their activations stay in L2 while the weights stream past.
template <class policy>
void multiply(const gemm_args &args) {
    constexpr int nr = policy::nr;
    alignas(64) float sums[shared_blocks][nr * panel_rows];
    typename policy::ready ready;
    const int8x16_t codebook = load_codebook(args.codebook);
    const int blocks = (args.n_tokens + nr - 1) / nr;
    const int groups = args.k / group_columns;
    for (int begin = 0; begin < blocks; begin += shared_blocks) {
        const int end = blocks - begin < shared_blocks ? blocks : begin + shared_blocks;
        for (int panel = 0; panel < args.panels; panel++) {
            const tile *w = panel_at(args.weights, panel, groups);
            std::memset(sums, 0, sizeof(sums[0]) * (end - begin));
            if (end - begin > 1 || !policy::stream(args, w, block_at<nr>(args, begin), sums[0])) {
                for (int g = 0; g < groups; g += ready_capacity) {
                    const int count = groups - g < ready_capacity ? groups - g : ready_capacity;
                    ready.fill(w, groups, g, count, codebook);
                    // All full blocks in one go, then the last one of the matrix if it is smaller.
                    const int full = args.n_tokens / nr < end ? args.n_tokens / nr : end;
                    if (full > begin) policy::add(args, begin, full, ready, g, count, sums[0]);
                    if (full < end) policy::add(args, full, end, ready, g, count, sums[full - begin]);
                }
            }
            for (int b = begin; b < end; b++) policy::store(args, block_at<nr>(args, b), b, panel, sums[b - begin]);
        }
    }
}

/// Where group `first` of some blocks begins, and the distance from block to block.
struct group_operands {
    const int8_t *q;
    const float *scale;
    int blocks;
    size_t q_step, scale_step;
};

template <int nr>
inline group_operands operands_at(const gemm_args &args, int begin, int end, int first) {
    const activation_block block = block_at<nr>(args, begin);
    const size_t skipped = static_cast<size_t>(first) * block.n;
    return {block.q + skipped * group_columns, block.scale + (args.per_group ? skipped : 0), end - begin,
            static_cast<size_t>(args.k) * nr, static_cast<size_t>(args.per_group ? args.k / group_columns : 1) * nr};
}

// quantizer

/// The arithmetic that quantize_token calls.
template <int kr>
struct quantize_ops {
    class maximum {
      public:
        void add(const float *x, float refine) {
            for (int i = 0; i < group_columns; i += 4) {
                const float32x4_t value = vabsq_f32(vmulq_n_f32(vld1q_f32(x + i), refine));
                found_ = vmaxq_s32(found_, vreinterpretq_s32_f32(value));
            }
        }
        int bits() const { return vmaxvq_s32(found_); }

      private:
        int32x4_t found_ = vdupq_n_s32(0);
    };

    /// Sums and differences of lanes and their `partners`; `signs` are 1, and -1 for the second of a pair.
    static float32x4_t combine(float32x4_t v, float32x4_t partners, float32x4_t signs) {
        return vfmaq_f32(partners, v, signs);  // the product is exact
    }

    static void rotate(const float *x, float refine, float *y) {
        const float alternating[] = {1, -1, 1, -1};
        const float32x4_t odd = vld1q_f32(alternating);
        const float32x4_t upper = vcombine_f32(vdup_n_f32(1), vdup_n_f32(-1));
        float32x4_t v[16];
        AGQ_UNROLL
        for (int i = 0; i < 16; i++) {
            v[i] = vmulq_n_f32(vmulq_n_f32(vld1q_f32(x + 4 * i), refine), 0.125f);
            v[i] = combine(v[i], vrev64q_f32(v[i]), odd);
            v[i] = combine(v[i], vextq_f32(v[i], v[i], 2), upper);
        }
        AGQ_UNROLL
        for (int half = 1; half < 16; half *= 2) {
            AGQ_UNROLL
            for (int i = 0; i < 16; i++) {
                if (i & half) continue;
                const float32x4_t first = v[i], second = v[i + half];
                v[i] = vaddq_f32(first, second);
                v[i + half] = vsubq_f32(first, second);
            }
        }
        AGQ_UNROLL
        for (int i = 0; i < 16; i++) vst1q_f32(y + 4 * i, v[i]);
    }

    static int quantize(const float *x, float refine, float factor, int limit, int n, int8_t *q) {
        const int32x4_t high = vdupq_n_s32(limit), low = vdupq_n_s32(-limit);
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < group_columns; i += 16) {
            int32x4_t v[4];
            for (int j = 0; j < 4; j++) {
                const float32x4_t refined = vmulq_n_f32(vld1q_f32(x + i + 4 * j), refine);
                // Rounds to nearest, ties to even, whatever the thread's rounding mode is.
                const int32x4_t value = vcvtnq_s32_f32(vmulq_n_f32(refined, factor));
                v[j] = vmaxq_s32(low, vminq_s32(high, value));
                sum = vaddq_s32(sum, v[j]);
            }
            const int16x8_t first = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
            const int16x8_t second = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
            if (kr == 8) {
                vst1_s8(q + i * n, vmovn_s16(first));
                vst1_s8(q + (i + 8) * n, vmovn_s16(second));
            } else {
                static_assert(kr == 8 || kr % 16 == 0, "no other packing");
                vst1q_s8(q + i / kr * kr * n + i % kr, vcombine_s8(vmovn_s16(first), vmovn_s16(second)));
            }
        }
        return vaddvq_s32(sum);
    }
};

}  // namespace
}  // namespace agq
