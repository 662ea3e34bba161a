// Attention for few rows (kernels/attention_few.h), with vectors of AGQ_VECTOR floats.
#include "kernels/isa.h"
#include "kernels/portable/score_rows.h"

namespace agq {
namespace {

/// c[R][K] = (Add ? c : 0) + a[R][depth] * transposed b[K][depth]. K is as large as needed for whole result vectors.
template <int R, bool Add>
struct dot_tile {
    static constexpr int columns = AGQ_VECTOR / R > 4 ? AGQ_VECTOR / R : AGQ_VECTOR == 8 && R == 4 ? 2 : 4;
    static constexpr int sums = R * columns;

    static void run(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t depth) {
        vec sum[sums];
        AGQ_UNROLL
        for (int i = 0; i < sums; ++i) sum[i] = vec{};
        int64_t d = 0;
        do {  // do-while: otherwise the sums would pass through memory around the loop
            vec right[columns];
            AGQ_UNROLL
            for (int k = 0; k < columns; ++k) right[k] = load(b + k * ldb + d);
            AGQ_UNROLL
            for (int r = 0; r < R; ++r) {
                const vec left = load(a + r * lda + d);
                AGQ_UNROLL
                for (int k = 0; k < columns; ++k) sum[r * columns + k] += left * right[k];
            }
            d += AGQ_VECTOR;
        } while (d < depth);
        AGQ_UNROLL
        for (int n = sums / 2; n >= sums / AGQ_VECTOR; n /= 2) {
            AGQ_UNROLL
            for (int i = 0; i < n; ++i) sum[i] = fold(sum[2 * i], sum[2 * i + 1]);
        }
        float results[sums];
        AGQ_UNROLL
        for (int i = 0; i < sums / AGQ_VECTOR; ++i) store(results + i * AGQ_VECTOR, sum[i]);
        for (int r = 0; r < R; ++r) {
            for (int k = 0; k < columns; ++k) {
                float &to = c[r * ldc + k];
                to = (Add ? to : 0.0f) + results[r * columns + k];
            }
        }
    }
};

template <int R, bool Add>
inline void dot_tile_row(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t depth,
                         int64_t columns) {
    using tile = dot_tile<R, Add>;
    for (int64_t k = 0; k < columns; k += tile::columns) tile::run(a, lda, b + k * ldb, ldb, c + k, ldc, depth);
}

/// c[rows][columns] = (Add ? c : 0) + a[rows][depth] * transposed b[columns][depth]; `columns` and `depth` are
/// multiples of 16.
template <bool Add>
void dot_rows(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t rows,
              int64_t depth, int64_t columns) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dot_tile_row<4, Add>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
    for (; r < rows; ++r) dot_tile_row<1, Add>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns);
}

void few_read_masks(const few_args &args, int64_t first, few_block *block) {
    const token_range seen = read_masks(args, first, args.masks);
    block->begin = seen.begin;
    block->end = seen.end;
}

void few_attend(const few_args &args, const few_block &block) {
    const int64_t from = static_cast<int64_t>(block.begin) * args.group,
                  rows = static_cast<int64_t>(block.end) * args.group - from;
    const int64_t head_v = args.head_v;
    float *scores = args.scores + from * attention_keys, *out = args.out + from * head_v;
    dot_rows<false>(args.q + from * args.width, args.width, block.keys, args.width, scores, attention_keys, rows,
                    args.width, attention_keys);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = from + r;
        const float scale = weigh(scores + r * attention_keys, args.masks + row / args.group * attention_keys,
                                  args.slopes[row % args.group], args.soft_cap, args.maximum + row, args.sum + row);
        if (scale == 1) continue;
        for (int64_t i = 0; i < head_v; i += AGQ_VECTOR)
            store(out + r * head_v + i, load(out + r * head_v + i) * scale);
    }
    if (block.transposed) {
        dot_rows<true>(scores, attention_keys, block.values, attention_keys, out, head_v, rows, attention_keys, head_v);
    } else {
        multiply<true>(scores, attention_keys, block.values, head_v, out, head_v, rows, block.n, head_v);
    }
}

void few_read_f16(const char *from, size_t stride, int n, int width, float *to, int64_t to_stride, int64_t ahead) {
    for (int i = 0; i < n; ++i, from += stride, to += to_stride) {
        for (int line = 0; line < 2 * width; line += 64) __builtin_prefetch(from + ahead + line, 0, 2);
        f16_to_f32(reinterpret_cast<const uint16_t *>(from), to, width);
    }
}

}  // namespace

namespace isa::AGQ_ISA {

const few_kernel few = {few_read_masks, few_attend, few_read_f16};

}  // namespace isa::AGQ_ISA
}  // namespace agq
