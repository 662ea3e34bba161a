// AVX-512 with VNNI: VPDPBUSD multiplies 16 rows x 4 columns of unsigned codebook bytes by 4 signed activations that
// are broadcast to all rows.
//
// Three loops share the work:
//   stream_panel  one panel x 1..11 tokens, codes looked up on the way. For a single block of tokens, where reading the
//                 weights from memory is the limit: it walks the tiles strictly in file order and prefetches ahead.
//   stream_wide   the same for 12..24 tokens, one or two blocks, where arithmetic becomes the limit, too.
//   pair_blocks   two panels x 1..12 tokens, 24 accumulators. For many tokens, where arithmetic is the limit: the first
//                 block looks codes up on the way and keeps them in a scratch, which stays in L1 for the other blocks.
#include <cstring>

#include "format/panel.h"
#include "kernels/kernel.h"
#include "kernels/portable/unroll.h"
#include "kernels/portable/vector_kernel.h"
#include "kernels/x86/avx512_intrinsics.h"
#include "kernels/x86/x86_cpu.h"
#include "kernels/x86/x86_scales.h"

namespace agq {
namespace {

constexpr int nr = 12;

// integer arithmetic

/// sum + the products of unsigned bytes `u` and signed bytes `x`, added in fours.
///
/// With 24 accumulators, GCC 12 compiles _mm512_dpbusd_epi32 with a register copy for almost every product, which
/// halves the speed. An in-out operand for the accumulator prevents this.
inline __m512i dot(__m512i sum, __m512i u, __m512i x) {
#if defined(__GNUC__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, u, x);
#endif
}

/// The 4 activations at `x`, for all rows.
inline __m512i broadcast(const int8_t *x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

/// dot() with the 4 activations at `x`, broadcast by the instruction itself.
inline __m512i dot_broadcast(__m512i sum, __m512i u, const int8_t *x) {
#if defined(__GNUC__)
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
    return sum;
#else
    return dot(sum, u, broadcast(x));
#endif
}

/// The codebook bytes of one chunk: `low` is columns 0..3 of its 8, `high` columns 4..7.
struct chunk {
    __m512i low, high;
};

inline chunk look_up(const uint8_t *codes, __m512i codebook) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i pairs = _mm512_loadu_si512(codes);
    return {_mm512_shuffle_epi8(codebook, _mm512_and_si512(pairs, nibble)),
            _mm512_shuffle_epi8(codebook, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble))};
}

/// The codebook in each of the four 128-bit lanes.
inline __m512i load_codebook(const uint8_t *codebook) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codebook)));
}

/// The scales D of 16 rows.
inline __m512 widen(half_scales d) {
    return _mm512_cvtph_ps(_mm256_set_m128i(d.rows8, d.rows0));
}

/// sum + D * I, times the (token, group) scale if there is one.
template <bool per_group>
inline __m512 add_group(__m512 sum, __m512 d, __m512i integers, const float *scale) {
    const __m512 product = _mm512_cvtepi32_ps(integers);
    if (per_group) return _mm512_fmadd_ps(_mm512_mul_ps(product, d), _mm512_set1_ps(*scale), sum);
    return _mm512_fmadd_ps(product, d, sum);
}

// a single block of tokens: one panel at a time, limited by memory speed

AGQ_INLINE void prefetch_stream(const void *p, fetch_ahead ahead) {
    const char *line = static_cast<const char *>(p);
    _mm_prefetch(line + ahead.level1, _MM_HINT_T0);
    _mm_prefetch(line + ahead.level2, _MM_HINT_T1);
}

/// State of a block of n tokens while a panel is processed.
template <int n>
struct stream_operands {
    const int8_t *q;
    const int32_t *bias;
    const float *scale;
    fetch_ahead ahead;
    __m512 sum[n];
};

/// One group of 64 columns: 8 chunks, and scales().
template <int n, bool per_group, class function>
AGQ_INLINE void stream_group(stream_operands<n> &x, const uint8_t (*codes)[64], __m512i codebook,
                             const function &scales) {
    // Separate sums for low and high nibbles halve the chain of dependent instructions.
    __m512i low[n], high[n];
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        low[t] = _mm512_set1_epi32(x.bias[t]);
        high[t] = _mm512_setzero_si512();
    }
    AGQ_UNROLL
    for (int c = 0; c < 8; c++) {
        prefetch_stream(codes[c], x.ahead);
        const chunk u = look_up(codes[c], codebook);
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            low[t] = dot_broadcast(low[t], u.low, x.q + 4 * t);
            high[t] = dot_broadcast(high[t], u.high, x.q + 4 * (n + t));
        }
        x.q += 8 * n;
    }
    const __m512 d = scales();
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        x.sum[t] = add_group<per_group>(x.sum[t], d, _mm512_add_epi32(low[t], high[t]), x.scale + t);
    }
    x.bias += n;
    if (per_group) x.scale += n;
}

/// dst[t][0 .. 15] of one panel for a block of n tokens.
template <int n, bool per_group>
void stream_panel(const gemm_args &args, const tile *panel, const activation_block &block, float *const *dst, int row) {
    const __m512i codebook = load_codebook(args.codebook);
    const int groups = args.k / group_columns;
    stream_operands<n> x = {block.q, block.bias, block.scale, args.ahead, {}};
    for (const tile *w = panel, *end = panel + groups / 2; w != end; w++) {
        prefetch_stream(w->scale_hi, x.ahead);
        for (int half = 0; half < 2; half++) {
            stream_group<n, per_group>(x, w->codes + 8 * half, codebook, [=] { return widen(row_scales(*w, half)); });
        }
    }
    if (groups % 2 == 1) {
        const half_tile &w = last_half(panel, groups);
        stream_group<n, per_group>(x, w.codes, codebook, [&w] { return widen(row_scales(w)); });
    }
    AGQ_UNROLL
    for (int t = 0; t < n; t++) {
        _mm512_storeu_ps(dst[t] + row, _mm512_mul_ps(x.sum[t], _mm512_set1_ps(final_factor(args, block, t))));
    }
}

// 12 to 24 tokens: one panel at a time, limited by memory speed or arithmetic

/// Keeps the compiler from moving loads, stores and anything that depends on the two sums across this line.
inline void stay_in_order(__m512i &a, __m512i &b) {
#if defined(__GNUC__)
    asm volatile("" : "+v"(a), "+v"(b) : : "memory");
#else
    (void)a, (void)b;
#endif
}

/// The sums of one panel and a block of n tokens, and what comes next in its activations.
template <int n, bool per_group>
class block_sums {
  public:
    block_sums(const activation_block &block, float (*sums)[16])
        : q_(block.q), bias_(block.bias), scale_(block.scale), last_scale_(block.scale), sums_(sums) {
        AGQ_UNROLL
        for (int t = 0; t < n; t++) integers_[t] = _mm512_setzero_si512();
    }

    /// Adds D * I of the last group, and starts the next one with the products of its first chunk.
    AGQ_INLINE void turn_over(__m512 last_d, const chunk &u) {
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            _mm512_store_ps(sums_[t], added(t, last_d));
            integers_[t] = dot_broadcast(_mm512_set1_epi32(bias_[t]), u.low, q_ + 4 * t);
            integers_[t] = dot_broadcast(integers_[t], u.high, q_ + 4 * (n + t));
        }
    }
    /// The products of the low or the high columns of chunk c.
    AGQ_INLINE void multiply(int c, bool high, __m512i u) {
        AGQ_UNROLL
        for (int t = 0; t < n; t++) integers_[t] = dot_broadcast(integers_[t], u, q_ + 8 * n * c + 4 * (high * n + t));
    }
    AGQ_INLINE void end_group() {
        stay();
        q_ += group_columns * n;
        bias_ += n;
        last_scale_ = scale_;
        if (per_group) scale_ += n;
    }
    /// Adds the last group, and writes dst[t][row ...].
    AGQ_INLINE void finish(const gemm_args &args, const activation_block &block, __m512 last_d, float *const *dst,
                           int row) const {
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            const __m512 factor = _mm512_set1_ps(final_factor(args, block, t));
            _mm512_storeu_ps(dst[t] + row, _mm512_mul_ps(added(t, last_d), factor));
        }
    }
    AGQ_INLINE void stay() { stay_in_order(integers_[0], integers_[n - 1]); }

  private:
    AGQ_INLINE __m512 added(int t, __m512 d) const {
        return add_group<per_group>(_mm512_load_ps(sums_[t]), d, integers_[t], last_scale_ + t);
    }

    const int8_t *q_;
    const int32_t *bias_;
    const float *scale_, *last_scale_;  ///< of the group that comes next, and of the one before it
    __m512i integers_[n];               ///< of the group before, complete but not added yet
    float (*sums_)[16];
};

/// dst[t][0 .. 15] of one panel for a block of n tokens and, if `more` is not 0, one of `more` tokens.
///
/// There are so many integer sums that each waits long enough for its last product. The end of a group is interleaved
/// with the beginning of the next one, token by token, as in pair_blocks.
template <int n, int more, bool per_group>
void stream_wide(const gemm_args &args, const tile *panel, const activation_block *blocks, float *const *dst, int row) {
    const __m512i codebook = load_codebook(args.codebook);
    const int groups = args.k / group_columns;
    alignas(64) float sums[n + more][16];
    std::memset(sums, 0, sizeof sums);
    block_sums<n, per_group> a(blocks[0], sums);
    block_sums<more ? more : 1, per_group> b(blocks[more ? 1 : 0], sums + (more ? n : 0));  // not used if `more` is 0
    __m512 last_d = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        const uint8_t (*codes)[64] = chunks_of(panel, groups, g);
        const __m512 d = widen(row_scales(panel, groups, g));
        prefetch_stream(codes[8], args.ahead);  // the scales, where they follow the codes
        prefetch_stream(codes[0], args.ahead);
        const chunk first = look_up(codes[0], codebook);
        a.turn_over(last_d, first);
        if (more) b.turn_over(last_d, first);
        AGQ_UNROLL
        for (int c = 1; c < 8; c++) {
            a.stay();
            prefetch_stream(codes[c], args.ahead);
            const chunk u = look_up(codes[c], codebook);
            a.multiply(c, false, u.low);
            if (more) b.multiply(c, false, u.low);
            a.multiply(c, true, u.high);
            if (more) b.multiply(c, true, u.high);
        }
        last_d = d;
        a.end_group();
        if (more) b.end_group();
    }
    a.finish(args, blocks[0], last_d, dst, row);
    if (more) b.finish(args, blocks[1], last_d, dst + n, row);
}

// many tokens: two panels at a time, codes looked up once for many blocks

/// A group of 64 columns of two panels, ready for pair_blocks: codebook bytes and scales.
struct pair_group {
    uint8_t u[16][2][64];  ///< [4 columns][panel][16 rows x 4 columns]
    float d[2][16];
};

constexpr int scratch_groups = 8;   ///< groups in a scratch: 17 KiB, half of the smallest L1
constexpr int scratch_blocks = 43;  ///< token blocks that share one look-up: a batch of 512 tokens, 66 KiB of sums

/// The f32 sums of a block of tokens for a pair of panels.
using pair_sums = float[nr][2][16];

/// Codes that are in the scratch already.
class stored_codes {
  public:
    stored_codes(pair_group *scratch) : scratch_(scratch) {}

    const pair_group &begin(int g) { return *(now_ = scratch_ + g); }
    void load(int step, __m512i &first, __m512i &second) const {
        first = _mm512_load_si512(now_->u[step][0]);
        second = _mm512_load_si512(now_->u[step][1]);
    }

  private:
    pair_group *scratch_, *now_ = nullptr;
};

/// Codes that are looked up on the way, between the products, and kept in the scratch for further blocks. To fill the
/// scratch before the products makes 16 tokens 7% slower.
class new_codes {
  public:
    /// Group 0 of the scratch is group `first` of the panels, which have `groups`.
    new_codes(const gemm_args &args, const tile *const panel[2], int groups, int first, pair_group *scratch)
        : codebook_(load_codebook(args.codebook)),
          panel_{panel[0], panel[1]},
          groups_(groups),
          first_(first),
          scratch_(scratch) {}

    const pair_group &begin(int g) {
        now_ = scratch_ + g;
        for (int p = 0; p < 2; p++) {
            codes_[p] = chunks_of(panel_[p], groups_, first_ + g);
            _mm512_store_ps(now_->d[p], widen(row_scales(panel_[p], groups_, first_ + g)));
        }
        return *now_;
    }
    void load(int step, __m512i &first, __m512i &second) const {
        first = look_up_half(0, step);
        second = look_up_half(1, step);
        _mm512_store_si512(now_->u[step][0], first);
        _mm512_store_si512(now_->u[step][1], second);
    }

  private:
    __m512i look_up_half(int p, int step) const {
        __m512i pairs = _mm512_loadu_si512(codes_[p][step / 2]);
        if (step % 2 == 1) pairs = _mm512_srli_epi16(pairs, 4);
        return _mm512_shuffle_epi8(codebook_, _mm512_and_si512(pairs, _mm512_set1_epi8(15)));
    }

    __m512i codebook_;
    const tile *panel_[2];
    int groups_, first_;
    pair_group *scratch_, *now_ = nullptr;
    const uint8_t (*codes_[2])[64] = {nullptr, nullptr};
};

/// Adds D * I of two panels and one token to its sums.
template <bool per_group>
inline void add_pair(float sums[2][16], const pair_group &w, __m512i first, __m512i second, const float *scale) {
    _mm512_store_ps(sums[0], add_group<per_group>(_mm512_load_ps(sums[0]), _mm512_load_ps(w.d[0]), first, scale));
    _mm512_store_ps(sums[1], add_group<per_group>(_mm512_load_ps(sums[1]), _mm512_load_ps(w.d[1]), second, scale));
}

/// Adds the last D * I of two panels and one token to its sums, and writes the results to `out`.
template <bool per_group>
inline void finish_pair(const float sums[2][16], const pair_group &w, __m512i first, __m512i second, const float *scale,
                        float factor, float *out) {
    const __m512 f = _mm512_set1_ps(factor);
    const __m512 a = add_group<per_group>(_mm512_load_ps(sums[0]), _mm512_load_ps(w.d[0]), first, scale);
    const __m512 b = add_group<per_group>(_mm512_load_ps(sums[1]), _mm512_load_ps(w.d[1]), second, scale);
    _mm512_storeu_ps(out, _mm512_mul_ps(f, a));
    _mm512_storeu_ps(out + 16, _mm512_mul_ps(f, b));
}

/// The first products of a group: starts both sums of a token at its bias.
inline void start_pair(__m512i &first, __m512i &second, __m512i u0, __m512i u1, const int8_t *q, int32_t bias) {
    const __m512i four = broadcast(q);
    first = second = _mm512_set1_epi32(bias);
    first = dot(first, u0, four);
    second = dot(second, u1, four);
    stay_in_order(first, second);
}

/// What a pair_blocks call reads, besides the scratch.
struct pair_operands {
    const int8_t *q;  ///< activations of the first block, at the scratch's first group
    const int32_t *bias;
    const float *scale;
    const tile *next[2];  ///< tiles of both panels to prefetch for the next scratch; or null
    float *const *dst;    ///< with the last scratch: [tokens of all blocks] where results go; else null
    int row;              ///< row in dst of the first panel
};

/// The remaining factor for a token's sum; tokens count from the first block.
template <bool per_group>
inline float pair_factor(const gemm_args &args, const pair_operands &x, int token) {
    return per_group ? args.tensor_scale : args.tensor_scale * x.scale[token];
}

/// sums[b][t] += the groups of the scratch times n tokens, for each block b. With the last scratch, the results are
/// stored instead.
///
/// Zen 4 can start one 512-bit VPDPBUSD or one FMA per cycle. So the two FMAs per token and group cost 24 cycles, next
/// to 384 for the products. If each group ends before the next begins, its conversions, FMAs and stores fill the
/// schedulers while they wait for one another; that costs 50 more cycles. So the end of a group is interleaved with the
/// first products of the next one, token by token, across all blocks. Results are stored in the same way: a separate
/// pass over the sums of all blocks would wait for memory, 1/6 of the time at 2048 columns on an Ice Lake.
template <int n, bool per_group, class source>
void pair_blocks(const gemm_args &args, source codes, int groups, int blocks, pair_operands x, pair_sums *sums) {
    const size_t k = args.k;
    __m512i first[n], second[n];
    AGQ_UNROLL
    for (int t = 0; t < n; t++) first[t] = second[t] = _mm512_setzero_si512();
    // The group whose integers are complete but not added yet; at first, zeros are added with the scales of the first.
    const pair_group *last_w = nullptr;
    const float *last_scale = x.scale;
    float (*last_sums)[2][16] = sums[0];

    for (int b = 0; b < blocks; b++) {
        const int8_t *q = x.q + b * (n * k);
        const int32_t *bias = x.bias + b * (n * k / group_columns);
        const float *scale = x.scale + (per_group ? b * (n * k / group_columns) : 0);
        for (int g = 0; g < groups; g++) {
            // Each group of the first block prefetches one tile of 17 lines, so 8 groups prefetch the whole next
            // scratch. Later blocks prefetch the activations and sums of the block after them.
            const bool fetch = b == 0 && x.next[0] != nullptr;
            const char *ahead = fetch ? reinterpret_cast<const char *>(x.next[g % 2] + g / 2)
                                      : reinterpret_cast<const char *>(q + n * k);
            const char *ahead_sums = reinterpret_cast<const char *>(sums[b + 1]) + g * 192;
            _mm_prefetch(ahead, _MM_HINT_T0);
            _mm_prefetch(ahead_sums, _MM_HINT_T0);
            _mm_prefetch(ahead_sums + 64, _MM_HINT_T0);
            _mm_prefetch(ahead_sums + 128, _MM_HINT_T0);
            const pair_group &w = codes.begin(g);
            if (last_w == nullptr) last_w = &w;
            __m512i u0, u1;
            codes.load(0, u0, u1);
            if (x.dst != nullptr && g == 0 && b > 0) {
                AGQ_UNROLL
                for (int t = 0; t < n; t++) {
                    finish_pair<per_group>(last_sums[t], *last_w, first[t], second[t], last_scale + t,
                                           pair_factor<per_group>(args, x, (b - 1) * n + t),
                                           x.dst[(b - 1) * n + t] + x.row);
                    start_pair(first[t], second[t], u0, u1, q + 4 * t, bias[t]);
                }
            } else {
                AGQ_UNROLL
                for (int t = 0; t < n; t++) {
                    add_pair<per_group>(last_sums[t], *last_w, first[t], second[t], last_scale + t);
                    start_pair(first[t], second[t], u0, u1, q + 4 * t, bias[t]);
                }
            }
            if (x.dst != nullptr) {
                for (int t = g * n / groups; t < (g + 1) * n / groups; t++) {
                    const char *out = reinterpret_cast<const char *>(x.dst[b * n + t] + x.row);
                    _mm_prefetch(out, _MM_HINT_T0);
                    _mm_prefetch(out + 64, _MM_HINT_T0);
                }
            }
            q += 4 * n;
            AGQ_UNROLL
            for (int i = 1; i < 16; i++) {
                _mm_prefetch(ahead + 64 * i, _MM_HINT_T0);
                codes.load(i, u0, u1);
                AGQ_UNROLL
                for (int t = 0; t < n; t++) {
                    const __m512i four = broadcast(q + 4 * t);
                    first[t] = dot(first[t], u0, four);
                    second[t] = dot(second[t], u1, four);
                }
                q += 4 * n;
            }
            _mm_prefetch(ahead + 64 * 16, _MM_HINT_T0);
            last_w = &w;
            last_sums = sums[b];
            last_scale = scale;
            bias += n;
            if (per_group) scale += n;
        }
    }
    if (x.dst != nullptr) {
        const int b = blocks - 1;
        AGQ_UNROLL
        for (int t = 0; t < n; t++) {
            finish_pair<per_group>(last_sums[t], *last_w, first[t], second[t], last_scale + t,
                                   pair_factor<per_group>(args, x, b * n + t), x.dst[b * n + t] + x.row);
        }
    } else {
        AGQ_UNROLL
        for (int t = 0; t < n; t++) add_pair<per_group>(last_sums[t], *last_w, first[t], second[t], last_scale + t);
    }
}

// dispatch by number of tokens

using stream_fn = void (*)(const gemm_args &, const tile *, const activation_block &, float *const *, int);
using pair_fn = void (*)(const gemm_args &, stored_codes, int, int, pair_operands, pair_sums *);
using wide_fn = void (*)(const gemm_args &, const tile *, const activation_block *, float *const *, int);

template <int n, bool per_group>
constexpr wide_fn two_blocks = stream_wide<nr, n, per_group>;

#define AGQ_BELOW_12(name, ...)                                                                                        \
    name<1, __VA_ARGS__>, name<2, __VA_ARGS__>, name<3, __VA_ARGS__>, name<4, __VA_ARGS__>, name<5, __VA_ARGS__>,      \
        name<6, __VA_ARGS__>, name<7, __VA_ARGS__>, name<8, __VA_ARGS__>, name<9, __VA_ARGS__>, name<10, __VA_ARGS__>, \
        name<11, __VA_ARGS__>
#define AGQ_BY_TOKENS(name, ...) {AGQ_BELOW_12(name, __VA_ARGS__), name<12, __VA_ARGS__>}
constexpr stream_fn stream_table[2][nr - 1] = {{AGQ_BELOW_12(stream_panel, false)}, {AGQ_BELOW_12(stream_panel, true)}};
constexpr wide_fn full_block[2] = {stream_wide<nr, 0, false>, stream_wide<nr, 0, true>};
constexpr wide_fn two_table[2][nr] = {AGQ_BY_TOKENS(two_blocks, false), AGQ_BY_TOKENS(two_blocks, true)};
constexpr pair_fn pair_table[2][nr] = {AGQ_BY_TOKENS(pair_blocks, false, stored_codes),
                                       AGQ_BY_TOKENS(pair_blocks, true, stored_codes)};
#undef AGQ_BY_TOKENS
#undef AGQ_BELOW_12

/// One panel times all blocks.
void multiply_panel(const gemm_args &args, int panel, int block_begin, int block_end) {
    const tile *w = panel_at(args.weights, panel, args.k / group_columns);
    for (int b = block_begin; b < block_end; b++) {
        const activation_block block = block_at<nr>(args, b);
        float *const *dst = args.dst + b * nr;
        if (block.n == nr) {
            full_block[args.per_group](args, w, &block, dst, panel * panel_rows);
        } else {
            stream_table[args.per_group][block.n - 1](args, w, block, dst, panel * panel_rows);
        }
    }
}

/// One panel times two blocks, the first of which is full.
void multiply_wide(const gemm_args &args, int panel, int block_begin) {
    const tile *w = panel_at(args.weights, panel, args.k / group_columns);
    const activation_block blocks[2] = {block_at<nr>(args, block_begin), block_at<nr>(args, block_begin + 1)};
    two_table[args.per_group][blocks[1].n - 1](args, w, blocks, args.dst + block_begin * nr, panel * panel_rows);
}

/// Two panels times some blocks: at least 2, so the first one is full, and at most scratch_blocks.
void multiply_pair(const gemm_args &args, int panel, int block_begin, int block_end) {
    alignas(64) pair_group scratch[scratch_groups];
    alignas(64) pair_sums sums[scratch_blocks];
    const int groups = args.k / group_columns;
    const int full_blocks = args.n_tokens / nr;
    const tile *const pair[2] = {panel_at(args.weights, panel, groups), panel_at(args.weights, panel + 1, groups)};

    std::memset(sums, 0, sizeof(pair_sums) * (block_end - block_begin));
    for (int g = 0; g < groups; g += scratch_groups) {
        const int groups_here = groups - g < scratch_groups ? groups - g : scratch_groups;
        // The next weights belong to these panels or, after their last group, to the next pair.
        const int next = g + scratch_groups < groups ? (g + scratch_groups) / 2 : groups;
        for (int b = block_begin; b < block_end;) {
            const activation_block block = block_at<nr>(args, b);
            const size_t skipped = static_cast<size_t>(g) * block.n;
            pair_operands x = {block.q + skipped * group_columns,
                               block.bias + skipped,
                               block.scale + (args.per_group ? skipped : 0),
                               {nullptr, nullptr},
                               g + groups_here < groups ? nullptr : args.dst + b * nr,
                               panel * panel_rows};
            if (b == block_begin) {
                x.next[0] = pair[0] + next, x.next[1] = pair[1] + next;
                const new_codes codes(args, pair, groups, g, scratch);
                (args.per_group ? pair_blocks<nr, true, new_codes>
                                : pair_blocks<nr, false, new_codes>)(args, codes, groups_here, 1, x, sums);
                b++;
                continue;
            }
            // All full blocks at once, then the last one of the matrix if it is smaller.
            const int count = block.n < nr ? 1 : (block_end < full_blocks ? block_end : full_blocks) - b;
            pair_table[args.per_group][block.n - 1](args, scratch, groups_here, count, x, sums + (b - block_begin));
            b += count;
        }
    }
}

void gemm(const gemm_args &args) {
    const int blocks = (args.n_tokens + nr - 1) / nr;
    // The outer loop is over tokens: their activations stay in cache while the weights, which are smaller, stream past.
    const int parts = (blocks + scratch_blocks - 1) / scratch_blocks;
    for (int i = 0; i < parts; i++) {
        const int begin = static_cast<int>(static_cast<int64_t>(blocks) * i / parts);
        const int end = static_cast<int>(static_cast<int64_t>(blocks) * (i + 1) / parts);
        int panel = 0;
        if (end - begin == 2) {
            for (; panel < args.panels; panel++) multiply_wide(args, panel, begin);
        } else if (end - begin > 2) {
            for (; panel + 2 <= args.panels; panel += 2) multiply_pair(args, panel, begin, end);
        }
        for (; panel < args.panels; panel++) multiply_panel(args, panel, begin, end);
    }
}

// quantizer

struct quantize_ops {
    class maximum {
      public:
        void add(const float *x, float refine) {
            for (int i = 0; i < group_columns; i += 16) {
                const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(refine));
                const __m512i bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF));
                found_ = _mm512_max_epi32(found_, bits);
            }
        }
        int bits() const { return _mm512_reduce_max_epi32(found_); }

      private:
        __m512i found_ = _mm512_setzero_si512();
    };

    /// Sums and differences of lanes and their `partners`; a lane in `second` is the second of its pair.
    static __m512 combine(__m512 v, __m512 partners, __mmask16 second) {
        const __m512 signs = _mm512_mask_blend_ps(second, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
        return _mm512_fmadd_ps(v, signs, partners);  // the product is exact
    }

    static void rotate(const float *x, float refine, float *y) {
        __m512 v[4];
        AGQ_UNROLL
        for (int i = 0; i < 4; i++) {
            v[i] = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(refine));
            v[i] = _mm512_mul_ps(v[i], _mm512_set1_ps(0.125f));
            v[i] = combine(v[i], _mm512_permute_ps(v[i], 0xB1), 0xAAAA);
            v[i] = combine(v[i], _mm512_permute_ps(v[i], 0x4E), 0xCCCC);
            v[i] = combine(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0xB1), 0xF0F0);
            v[i] = combine(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4E), 0xFF00);
        }
        const __m512 a = _mm512_add_ps(v[0], v[1]), b = _mm512_sub_ps(v[0], v[1]);
        const __m512 c = _mm512_add_ps(v[2], v[3]), d = _mm512_sub_ps(v[2], v[3]);
        _mm512_store_ps(y, _mm512_add_ps(a, c));
        _mm512_store_ps(y + 16, _mm512_add_ps(b, d));
        _mm512_store_ps(y + 32, _mm512_sub_ps(a, c));
        _mm512_store_ps(y + 48, _mm512_sub_ps(b, d));
    }

    static int quantize(const float *x, float refine, float factor, int limit, int n, int8_t *q) {
        const __m512i high = _mm512_set1_epi32(limit);
        const __m512i low = _mm512_set1_epi32(-limit);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < group_columns; i += 16) {
            const __m512 refined = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(refine));
            // The conversion uses the thread's rounding mode: to nearest, ties to even.
            const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(refined, _mm512_set1_ps(factor)));
            const __m512i clamped = _mm512_max_epi32(low, _mm512_min_epi32(high, value));
            sum = _mm512_add_epi32(sum, clamped);
            alignas(16) int8_t bytes[16];
            _mm_store_si128(reinterpret_cast<__m128i *>(bytes), _mm512_cvtepi32_epi8(clamped));
            for (int j = 0; j < 4; j++) std::memcpy(q + (i / 4 + j) * n * 4, bytes + 4 * j, 4);
        }
        return _mm512_reduce_add_epi32(sum);
    }
};

bool supported() {
    return detect_x86().avx512vnni;
}

}  // namespace

const kernel kernel_avx512vnni = {"avx512vnni",
                                  supported,
                                  nr,
                                  2,
                                  quantize_block<quantize_ops>,
                                  gemm,
                                  AGQ_ATTENTION(isa::avx512vnni::attention),
                                  4,
                                  0,
                                  &isa::avx512vnni::rows,
                                  &isa::avx512vnni::rounding,
                                  &isa::avx512vnni::q8};

}  // namespace agq
