// Internal to the x86 kernels with 256-bit registers: one panel of 16 rows as two registers, times 1..6 tokens.
//
// The dot product of 4 bytes is a policy, because it is all that differs between AVX2 and AVX-VNNI:
//
//   struct policy {
//       static __m256i start(int32_t bias);                         accumulator at the beginning of a group of 64
//       static void step(__m256i &rows0, __m256i &rows8, columns4 u, const int8_t *x);
//                                                                   plus unsigned bytes u times the 4 signed bytes x
//       static __m256i finish(__m256i sum, int32_t bias);           int32 result, once the 16 steps of a group are done
//   };
//
// Everything is in an anonymous namespace, because each kernel file is compiled with flags of its own.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "format/panel.h"
#include "kernels/kernel.h"
#include "kernels/portable/unroll.h"
#include "kernels/portable/vector_kernel.h"
#include "kernels/x86/x86_scales.h"

namespace agq {
namespace {

constexpr int nr = 6;

/// Codebook bytes of 4 columns: rows 0..7 and rows 8..15.
struct columns4 {
    __m256i rows0, rows8;
};

inline void store(void *to, columns4 c) {
    _mm256_store_si256(static_cast<__m256i *>(to), c.rows0);
    _mm256_store_si256(static_cast<__m256i *>(to) + 1, c.rows8);
}

/// The 4 activations at `x`, for all rows.
inline __m256i broadcast(const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

inline __m256i load(const uint8_t *bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
}

/// The two sets of 4 columns of a chunk: `half` 0 is its low nibbles, 1 its high ones.
inline columns4 look_up(const uint8_t *codes, int half, __m256i codebook) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i rows0 = load(codes), rows8 = load(codes + 32);
    if (half == 1) {
        rows0 = _mm256_srli_epi16(rows0, 4);
        rows8 = _mm256_srli_epi16(rows8, 4);
    }
    return {_mm256_shuffle_epi8(codebook, _mm256_and_si256(rows0, nibble)),
            _mm256_shuffle_epi8(codebook, _mm256_and_si256(rows8, nibble))};
}

/// The scales D of rows 0..7 and 8..15.
struct scales16 {
    __m256 rows0, rows8;
};

inline scales16 widen(half_scales d) {
    return {_mm256_cvtph_ps(d.rows0), _mm256_cvtph_ps(d.rows8)};
}

AGQ_INLINE void prefetch_stream(const void *p, fetch_ahead ahead) {
    const char *line = static_cast<const char *>(p);
    _mm_prefetch(line + ahead.level1, _MM_HINT_T0);
    _mm_prefetch(line + ahead.level2, _MM_HINT_T1);
}

/// Prefetches weights that are looked up for many tokens.
AGQ_INLINE void prefetch_ahead(const void *p) {
    _mm_prefetch(static_cast<const char *>(p) + fetch_ahead{}.level1, _MM_HINT_T0);
}

/// Groups of a panel's full tiles, read directly from the file: codes are looked up on the way and memory is
/// prefetched. For a single block of tokens, where reading the weights is the limit.
struct stored_groups {
    const tile *w;
    __m256i codebook;
    fetch_ahead ahead;

    columns4 columns(int g, int i) const {
        if (i % 2 == 0) prefetch_stream(w[g / 2].codes[8 * (g % 2) + i / 2], ahead);
        return look_up(w[g / 2].codes[8 * (g % 2) + i / 2], i % 2, codebook);
    }
    scales16 scales(int g) const {
        if (g % 2 == 0) prefetch_stream(w[g / 2].scale_hi, ahead);
        return widen(row_scales(w[g / 2], g % 2));
    }
};

/// The same for the half tile at the end of a panel; it has one group.
struct stored_half {
    const half_tile &w;
    __m256i codebook;
    fetch_ahead ahead;

    columns4 columns(int, int i) const {
        if (i % 2 == 0) prefetch_stream(w.codes[i / 2], ahead);
        return look_up(w.codes[i / 2], i % 2, codebook);
    }
    scales16 scales(int) const { return widen(row_scales(w)); }
};

/// Groups of a panel that were looked up before, for many blocks of tokens.
struct ready_groups {
    static constexpr int capacity = 12;  ///< 13 KiB, less than half of the smallest L1
    alignas(64) uint8_t u[capacity][16][64];
    alignas(64) float d[capacity][16];

    columns4 columns(int g, int i) const { return {load(u[g][i]), load(u[g][i] + 32)}; }
    scales16 scales(int g) const { return {_mm256_load_ps(d[g]), _mm256_load_ps(d[g] + 8)}; }

    /// Looks up `count` groups of a panel that has `groups` groups, starting at group `first`.
    void fill(const tile *panel, int groups, int first, int count, __m256i codebook) {
        for (int g = 0; g < count; g++) {
            const uint8_t (*chunks)[64] = chunks_of(panel, groups, first + g);
            for (int i = 0; i < 16; i += 2) {
                const uint8_t *codes = chunks[i / 2];
                prefetch_ahead(codes);
                store(u[g][i], look_up(codes, 0, codebook));
                store(u[g][i + 1], look_up(codes, 1, codebook));
            }
            const scales16 s = widen(row_scales(panel, groups, first + g));
            _mm256_store_ps(d[g], s.rows0);
            _mm256_store_ps(d[g] + 8, s.rows8);
        }
    }
};

/// The f32 sums of a block of tokens for one panel.
using block_sums = float[nr][16];

/// Keeps the compiler from holding sums in registers over several groups. No registers are left, so it would spill the
/// sums and still write them to their place.
inline void sums_stay_in_memory() {
#if defined(__GNUC__)
    asm volatile("" : : : "memory");
#endif
}

/// Adds D * I of 8 rows, times the (token, group) scale if there is one, to `sums`.
template <bool per_group>
inline void add_group(float *sums, __m256 d, __m256i integers, const float *scale) {
    __m256 product = _mm256_cvtepi32_ps(integers);
    if (per_group) product = _mm256_mul_ps(product, _mm256_set1_ps(*scale));
    _mm256_store_ps(sums, _mm256_fmadd_ps(product, d, _mm256_load_ps(sums)));
}

/// sums[t] += the groups times n tokens.
template <class policy, class source, int n, bool per_group>
void add_groups(const source &w, int groups, const int8_t *q, const int32_t *bias, const float *scale,
                block_sums sums) {
    for (int g = 0; g < groups; g++) {
        __m256i rows0[n], rows8[n];
        for (int t = 0; t < n; t++) rows0[t] = rows8[t] = policy::start(bias[t]);
#if defined(__GNUC__)
#pragma GCC unroll 4
#endif
        for (int i = 0; i < 16; i++) {
            const columns4 u = w.columns(g, i);
            for (int t = 0; t < n; t++) policy::step(rows0[t], rows8[t], u, q + 4 * t);
            q += 4 * n;
        }
        const scales16 d = w.scales(g);
        for (int t = 0; t < n; t++) {
            add_group<per_group>(sums[t], d.rows0, policy::finish(rows0[t], bias[t]), scale + t);
            add_group<per_group>(sums[t] + 8, d.rows8, policy::finish(rows8[t], bias[t]), scale + t);
        }
        sums_stay_in_memory();
        bias += n;
        if (per_group) scale += n;
    }
}

/// Calls add_groups for the number of tokens and the mode.
template <class policy, class source>
void add_groups_of(const activation_block &block, bool per_group, const source &w, int first, int groups,
                   block_sums sums) {
    using function = void (*)(const source &, int, const int8_t *, const int32_t *, const float *, block_sums);
    static constexpr function table[2][nr] = {
        {add_groups<policy, source, 1, false>, add_groups<policy, source, 2, false>,
         add_groups<policy, source, 3, false>, add_groups<policy, source, 4, false>,
         add_groups<policy, source, 5, false>, add_groups<policy, source, 6, false>},
        {add_groups<policy, source, 1, true>, add_groups<policy, source, 2, true>, add_groups<policy, source, 3, true>,
         add_groups<policy, source, 4, true>, add_groups<policy, source, 5, true>, add_groups<policy, source, 6, true>},
    };
    const size_t skipped = static_cast<size_t>(first) * block.n;
    table[per_group][block.n - 1](w, groups, block.q + skipped * group_columns, block.bias + skipped,
                                  block.scale + (per_group ? skipped : 0), sums);
}

/// Applies the final factors and stores the results.
inline void store_block(const gemm_args &args, const activation_block &block, int b, int panel, const block_sums sums) {
    for (int t = 0; t < block.n; t++) {
        const __m256 factor = _mm256_set1_ps(final_factor(args, block, t));
        float *out = args.dst[b * nr + t] + panel * panel_rows;
        _mm256_storeu_ps(out, _mm256_mul_ps(factor, _mm256_load_ps(sums[t])));
        _mm256_storeu_ps(out + 8, _mm256_mul_ps(factor, _mm256_load_ps(sums[t] + 8)));
    }
}

constexpr int shared_blocks = 32;  ///< token blocks that share one look-up

/// One panel times blocks begin .. end - 1, at most shared_blocks of them.
template <class policy>
void multiply_panel(const gemm_args &args, int panel, int begin, int end) {
    alignas(64) block_sums sums[shared_blocks];
    std::memset(sums, 0, sizeof(block_sums) * (end - begin));
    const int groups = args.k / group_columns;
    const tile *w = panel_at(args.weights, panel, groups);
    const __m256i codebook =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(args.codebook)));

    if (end - begin == 1) {
        const activation_block block = block_at<nr>(args, begin);
        const stored_groups tiles = {w, codebook, args.ahead};
        add_groups_of<policy>(block, args.per_group, tiles, 0, groups / 2 * 2, sums[0]);
        if (groups % 2 == 1) {
            const stored_half last = {last_half(w, groups), codebook, args.ahead};
            add_groups_of<policy>(block, args.per_group, last, groups - 1, 1, sums[0]);
        }
    } else {
        ready_groups ready;
        for (int g = 0; g < groups; g += ready_groups::capacity) {
            const int count = groups - g < ready_groups::capacity ? groups - g : ready_groups::capacity;
            ready.fill(w, groups, g, count, codebook);
            for (int b = begin; b < end; b++) {
                add_groups_of<policy>(block_at<nr>(args, b), args.per_group, ready, g, count, sums[b - begin]);
            }
        }
    }
    for (int b = begin; b < end; b++) store_block(args, block_at<nr>(args, b), b, panel, sums[b - begin]);
}

/// The gemm_fn of a kernel. The outer loop is over tokens: their activations stay in L2 while the weights stream past.
template <class policy>
void multiply(const gemm_args &args) {
    const int blocks = (args.n_tokens + nr - 1) / nr;
    for (int b = 0; b < blocks; b += shared_blocks) {
        const int end = blocks - b < shared_blocks ? blocks : b + shared_blocks;
        for (int panel = 0; panel < args.panels; panel++) multiply_panel<policy>(args, panel, b, end);
    }
}

// quantizer

/// The arithmetic that quantize_token calls.
template <int offset4>
struct quantize_ops {
    class maximum {
      public:
        void add(const float *x, float refine) {
            for (int i = 0; i < group_columns; i += 8) {
                const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(refine));
                const __m256i bits = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7FFFFFFF));
                found_ = _mm256_max_epi32(found_, bits);
            }
        }
        int bits() const {
            __m128i v = _mm_max_epi32(_mm256_castsi256_si128(found_), _mm256_extracti128_si256(found_, 1));
            v = _mm_max_epi32(v, _mm_unpackhi_epi64(v, v));
            return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 1)));
        }

      private:
        __m256i found_ = _mm256_setzero_si256();
    };

    /// Sums and differences of lanes and their `partners`; `signs` are 1, and -1 for the second of a pair.
    static __m256 combine(__m256 v, __m256 partners, __m256 signs) {
        return _mm256_fmadd_ps(v, signs, partners);  // the product is exact
    }

    static void rotate(const float *x, float refine, float *y) {
        const __m256 odd = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
        const __m256 upper_pairs = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
        const __m256 upper_half = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
        __m256 v[8];
        AGQ_UNROLL
        for (int i = 0; i < 8; i++) {
            v[i] = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(refine));
            v[i] = _mm256_mul_ps(v[i], _mm256_set1_ps(0.125f));
            v[i] = combine(v[i], _mm256_permute_ps(v[i], 0xB1), odd);
            v[i] = combine(v[i], _mm256_permute_ps(v[i], 0x4E), upper_pairs);
            v[i] = combine(v[i], _mm256_permute2f128_ps(v[i], v[i], 1), upper_half);
        }
        AGQ_UNROLL
        for (int half = 1; half < 8; half *= 2) {
            AGQ_UNROLL
            for (int i = 0; i < 8; i++) {
                if (i & half) continue;
                const __m256 first = v[i], second = v[i + half];
                v[i] = _mm256_add_ps(first, second);
                v[i + half] = _mm256_sub_ps(first, second);
            }
        }
        AGQ_UNROLL
        for (int i = 0; i < 8; i++) _mm256_store_ps(y + 8 * i, v[i]);
    }

    static int quantize(const float *x, float refine, float factor, int limit, int n, int8_t *q) {
        const __m256i high = _mm256_set1_epi32(limit);
        const __m256i low = _mm256_set1_epi32(-limit);
        const __m256i offset = _mm256_set1_epi8(limit == 7 ? offset4 : 0);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < group_columns; i += 32) {
            __m256i v[4];
            for (int j = 0; j < 4; j++) {
                const __m256 refined = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), _mm256_set1_ps(refine));
                // The conversion uses the thread's rounding mode: to nearest, ties to even.
                const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(refined, _mm256_set1_ps(factor)));
                v[j] = _mm256_max_epi32(low, _mm256_min_epi32(high, value));
                sum = _mm256_add_epi32(sum, v[j]);
            }
            // Packing works in 128-bit lanes: the first holds columns 0..3 of each v[j], the second columns 4..7.
            alignas(32) int8_t bytes[2][4][4];
            const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
            _mm256_store_si256(reinterpret_cast<__m256i *>(bytes), _mm256_add_epi8(packed, offset));
            for (int j = 0; j < 8; j++) std::memcpy(q + (i / 4 + j) * n * 4, bytes[j % 2][j / 2], 4);
        }
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
    }
};

}  // namespace
}  // namespace agq
