// Internal to the AVX2 kernel: the SIMD 4-bit multiplier, for many tokens with 4-bit activations.
//
// VPMADDUBSW multiplies unsigned by signed bytes, and only its signed operand may come from memory. So activations are
// unsigned, stored as x + 8 = 1..15, and weights are signed, u - 64 = -64..63. Each weight is read from memory where it
// is used, and a step of 8 rows x 4 columns x 1 token takes two instructions,
//
//   vpmaddubsw [weights], x, product        16 bits: pairs of products, at most 2 * 64 * 15 = 1920 in size
//   vpaddw     product, sum
//
// instead of three (and the load) with 8-bit activations. A 16-bit lane holds the sum of all 16 steps of a group. It
// starts at -8 * (sum of its weights), so that it ends at the sum of weight * x, at most 32 * 64 * 7 = 14336. It may
// wrap around on the way; the result is still correct. 32 rows (two panels) x 3 tokens take 12 sums, and each broadcast
// is used for 4 steps.
#pragma once

#include "kernels/x86/x86_256.h"

namespace agq {
namespace {

constexpr int activation_offset = 8;  ///< offset of stored 4-bit activations

/// Groups of two panels, already looked up.
struct ready_pair {
    static constexpr int capacity = 6;  ///< 13 KiB, less than half of the smallest L1
    alignas(64) int8_t w[capacity][16][4][32];
    alignas(64) int16_t start[capacity][4][16];
    alignas(64) float d[capacity][32];

    /// `codebook` holds u - 64.
    void fill(const tile *const panel[2], int groups, int first, int count, __m256i codebook) {
        for (int g = 0; g < count; g++) {
            for (int p = 0; p < 2; p++) {
                const uint8_t (*chunks)[64] = chunks_of(panel[p], groups, first + g);
                const __m256i offset = _mm256_set1_epi8(activation_offset);
                __m256i rows0 = _mm256_setzero_si256(), rows8 = rows0;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 1
#endif
                for (int i = 0; i < 16; i += 2) {
                    const uint8_t *codes = chunks[i / 2];
                    prefetch_ahead(codes);
                    const columns4 low = look_up(codes, 0, codebook), high = look_up(codes, 1, codebook);
                    store(w[g][i][2 * p], low);
                    store(w[g][i + 1][2 * p], high);
                    // The sum of two values is -128..126, which still fits a byte.
                    const __m256i both0 = _mm256_add_epi8(low.rows0, high.rows0);
                    const __m256i both8 = _mm256_add_epi8(low.rows8, high.rows8);
                    rows0 = _mm256_sub_epi16(rows0, _mm256_maddubs_epi16(offset, both0));
                    rows8 = _mm256_sub_epi16(rows8, _mm256_maddubs_epi16(offset, both8));
                }
                store(start[g][2 * p], {rows0, rows8});
                const scales16 s = widen(row_scales(panel[p], groups, first + g));
                _mm256_store_ps(d[g] + 16 * p, s.rows0);
                _mm256_store_ps(d[g] + 16 * p + 8, s.rows8);
            }
        }
    }
};

/// Adds the products of 4 columns of 32 rows and the 4 activations at `x`.
inline void step4(__m256i (&sum)[4], const int8_t (&w)[4][32], const int8_t *x) {
#ifdef __GNUC__
    // Otherwise GCC collects products before it adds them, and then spills the sums.
    __m256i four, product;
    asm("vpbroadcastd %[x], %[four]\n\t"
        "vpmaddubsw %[w0], %[four], %[product]\n\t"
        "vpaddw %[product], %[s0], %[s0]\n\t"
        "vpmaddubsw %[w1], %[four], %[product]\n\t"
        "vpaddw %[product], %[s1], %[s1]\n\t"
        "vpmaddubsw %[w2], %[four], %[product]\n\t"
        "vpaddw %[product], %[s2], %[s2]\n\t"
        "vpmaddubsw %[w3], %[four], %[four]\n\t"
        "vpaddw %[four], %[s3], %[s3]"
        : [s0] "+x"(sum[0]), [s1] "+x"(sum[1]), [s2] "+x"(sum[2]), [s3] "+x"(sum[3]), [four] "=&x"(four),
          [product] "=&x"(product)
        : [w0] "m"(w[0]), [w1] "m"(w[1]), [w2] "m"(w[2]), [w3] "m"(w[3]),
          [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
#else
    const __m256i four = broadcast(x);
    for (int i = 0; i < 4; i++) {
        const __m256i weights = _mm256_load_si256(reinterpret_cast<const __m256i *>(w[i]));
        sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(four, weights));
    }
#endif
}

/// The first step of a group: like step4, but the sums start at `start`.
inline void step4(__m256i (&sum)[4], const int16_t (&start)[4][16], const int8_t (&w)[4][32], const int8_t *x) {
#ifdef __GNUC__
    __m256i four;
    asm("vpbroadcastd %[x], %[four]\n\t"
        "vpmaddubsw %[w0], %[four], %[s0]\n\t"
        "vpmaddubsw %[w1], %[four], %[s1]\n\t"
        "vpmaddubsw %[w2], %[four], %[s2]\n\t"
        "vpmaddubsw %[w3], %[four], %[s3]\n\t"
        "vpaddw %[start0], %[s0], %[s0]\n\t"
        "vpaddw %[start1], %[s1], %[s1]\n\t"
        "vpaddw %[start2], %[s2], %[s2]\n\t"
        "vpaddw %[start3], %[s3], %[s3]"
        : [s0] "=&x"(sum[0]), [s1] "=&x"(sum[1]), [s2] "=&x"(sum[2]), [s3] "=&x"(sum[3]), [four] "=&x"(four)
        : [w0] "m"(w[0]), [w1] "m"(w[1]), [w2] "m"(w[2]), [w3] "m"(w[3]), [start0] "m"(start[0]),
          [start1] "m"(start[1]), [start2] "m"(start[2]), [start3] "m"(start[3]),
          [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
#else
    for (int i = 0; i < 4; i++) sum[i] = _mm256_load_si256(reinterpret_cast<const __m256i *>(start[i]));
    step4(sum, w, x);
#endif
}

/// Adds D * I of two panels and n tokens to their sums. `stride` is the number of tokens in the block.
template <int n, bool per_group>
void add_pair(const ready_pair &w, int groups, const int8_t *q, const float *scale, int stride, float (*sums)[32]) {
    for (int g = 0; g < groups; g++) {
        __m256i sum[n][4];
        for (int t = 0; t < n; t++) step4(sum[t], w.start[g], w.w[g][0], q + 4 * t);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 16
#endif
        for (int c = 1; c < 16; c++) {
            q += 4 * stride;
            for (int t = 0; t < n; t++) step4(sum[t], w.w[g][c], q + 4 * t);
        }
        q += 4 * stride;
        for (int t = 0; t < n; t++) {
            for (int i = 0; i < 4; i++) {
                const __m256i integers = _mm256_madd_epi16(sum[t][i], _mm256_set1_epi16(1));
                add_group<per_group>(sums[t] + 8 * i, _mm256_load_ps(w.d[g] + 8 * i), integers, scale + t);
            }
        }
        sums_stay_in_memory();
        if (per_group) scale += stride;
    }
}

/// The gemm_fn for 4-bit activations.
inline void multiply_4bit(const gemm_args &args) {
    using function = void (*)(const ready_pair &, int, const int8_t *, const float *, int, float (*)[32]);
    static constexpr function table[2][3] = {{add_pair<1, false>, add_pair<2, false>, add_pair<3, false>},
                                             {add_pair<1, true>, add_pair<2, true>, add_pair<3, true>}};
    constexpr int pair_blocks = 32;  // token blocks that share one look-up
    alignas(64) float sums[pair_blocks][nr][32];
    ready_pair ready;
    const int blocks = (args.n_tokens + nr - 1) / nr;
    const int groups = args.k / group_columns;
    const __m256i codebook =
        _mm256_sub_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(args.codebook))),
                        _mm256_set1_epi8(code_offset));

    for (int begin = 0; begin < blocks; begin += pair_blocks) {
        const int end = blocks - begin < pair_blocks ? blocks : begin + pair_blocks;
        for (int p = 0; p < args.panels; p += 2) {
            // A last single panel is multiplied twice and stored once.
            const int count = args.panels - p < 2 ? 1 : 2;
            const tile *const panel[2] = {panel_at(args.weights, p, groups),
                                          panel_at(args.weights, p + count - 1, groups)};
            std::memset(sums, 0, sizeof(sums[0]) * (end - begin));
            for (int g = 0; g < groups; g += ready_pair::capacity) {
                const int here = groups - g < ready_pair::capacity ? groups - g : ready_pair::capacity;
                ready.fill(panel, groups, g, here, codebook);
                for (int b = begin; b < end; b++) {
                    const activation_block block = block_at<nr>(args, b);
                    const size_t skipped = static_cast<size_t>(g) * block.n;
                    for (int t = 0; t < block.n; t += 3) {
                        const int tokens = block.n - t < 3 ? block.n - t : 3;
                        table[args.per_group][tokens - 1](ready, here, block.q + skipped * group_columns + 4 * t,
                                                          block.scale + (args.per_group ? skipped : 0) + t, block.n,
                                                          sums[b - begin] + t);
                    }
                }
            }
            for (int b = begin; b < end; b++) {
                const activation_block block = block_at<nr>(args, b);
                for (int t = 0; t < block.n; t++) {
                    const __m256 factor = _mm256_set1_ps(final_factor(args, block, t));
                    float *out = args.dst[b * nr + t] + p * panel_rows;
                    for (int r = 0; r < count * panel_rows; r += 8) {
                        _mm256_storeu_ps(out + r, _mm256_mul_ps(factor, _mm256_load_ps(sums[b - begin][t] + r)));
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace agq
