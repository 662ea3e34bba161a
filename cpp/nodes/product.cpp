// Threads take units of work from a shared counter, so a slow or busy core takes fewer.
#include "nodes/product.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "format/panel.h"
#include "host/tensor_rows.h"
#include "nodes/fetch_tuner.h"

namespace agq {

namespace {

/// How the panels of a product are handed out. With few tokens, reading the weights is the limit, and each start of a
/// new place wastes what memory could give. So the first units are large, and the last ones small enough to balance the
/// threads. With many tokens, all units have the same size: large enough to amortize the packed activations that each
/// streams through the cache.
class panel_queue {
  public:
    /// `panels`: of the product, with one of its experts. `tokens`: of the host's graph.
    panel_queue(std::atomic<int64_t> *next, int64_t panels, int64_t panel_step, int nth, int64_t tokens)
        : next_(next), few_(tokens < 64), threads_(nth), grain_(panel_step) {
        if (!few_) grain_ = std::max(panel_step, panels / (nth * units) / panel_step * panel_step);
    }

    /// Panels of a matrix are counted in grains; the last grain may be incomplete.
    int64_t grain() const { return grain_; }
    int64_t grains(int64_t panels) const { return (panels + grain_ - 1) / grain_; }

    /// Takes grains [*begin, *end) of `all`. Returns false if none is left.
    bool take(int64_t all, int64_t *begin, int64_t *end) {
        *begin = next_->load(std::memory_order_relaxed);
        do {
            if (*begin >= all) return false;
            *end = *begin + (few_ ? std::max<int64_t>(1, (all - *begin) / (share * threads_)) : 1);
        } while (!next_->compare_exchange_weak(*begin, *end, std::memory_order_relaxed));
        return true;
    }

  private:
    static constexpr int64_t units = 16;  // of each thread, with many tokens
    static constexpr int64_t share = 4;   // a thread takes this part of its share of the rest, with few tokens

    std::atomic<int64_t> *next_;
    bool few_;
    int64_t threads_, grain_;
};

/// A thread's memory for a product: pointers to the result rows. If the last panel has fewer than 16 rows, also that
/// panel padded to 16, and its results.
struct product_memory {
    float **rows, **results_at;  ///< [rows of the set]
    float *results;              ///< [rows of the set][16]
    tile *last_panel;
    size_t bytes;

    product_memory(const product &p, void *begin) {
        const size_t n = static_cast<size_t>(p.set->rows());
        const bool is_narrow = std::any_of(p.parts.begin(), p.parts.end(), [](const product::part &part) {
            return part.weights->ne[1] % panel_rows != 0;
        });
        auto *next = static_cast<unsigned char *>(begin);
        const auto take = [&](size_t size) {
            unsigned char *part = begin ? next + bytes : nullptr;
            bytes += align_up(size);
            return part;
        };
        bytes = 0;
        rows = reinterpret_cast<float **>(take(n * sizeof(float *)));
        results_at = reinterpret_cast<float **>(take(is_narrow ? n * sizeof(float *) : 0));
        results = reinterpret_cast<float *>(take(is_narrow ? n * panel_rows * sizeof(float) : 0));
        last_panel = reinterpret_cast<tile *>(take(is_narrow ? matrix_bytes(panel_rows, p.set->x->ne[0]) : 0));
    }
};

/// Runs the kernel for panels of `matrix`. With few tokens, reading the weights is the limit: how far ahead to ask for
/// them is measured first. With more, the kernel must ask: arithmetic fills the time in which the processor would see
/// what is read next.
void multiply_panels(const kernel &kern, gemm_args args, const tile *matrix) {
    constexpr int few_tokens = 4;
    if (args.n_tokens > few_tokens) return kern.gemm(args);
    fetch_tuner &fetches = fetch_tuner::of_process();
    const int choice = fetches.choice();
    args.ahead = fetch_choices[choice];
    if (!fetches.is_measuring()) return kern.gemm(args);
    const auto begin = std::chrono::steady_clock::now();
    kern.gemm(args);
    const auto taken = std::chrono::steady_clock::now() - begin;
    fetches.record(choice, matrix, static_cast<int64_t>(matrix_bytes(args.panels * panel_rows, args.k)),
                   std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count());
}

/// Multiplies the last panel of a matrix of `m` rows if it has fewer than 16 rows. The kernel takes it padded to 16;
/// only its real rows are copied to the result, at `args.dst`.
void multiply_last_panel(const kernel &kern, gemm_args args, const tile *matrix, int64_t m,
                         const product_memory &memory) {
    expand_last_panel(matrix, m, args.k, memory.last_panel);
    for (int t = 0; t < args.n_tokens; ++t) memory.results_at[t] = memory.results + panel_rows * t;
    float *const *wanted = args.dst;
    args.weights = memory.last_panel;
    args.panels = 1;
    args.dst = memory.results_at;
    kern.gemm(args);
    for (int t = 0; t < args.n_tokens; ++t) std::copy_n(memory.results_at[t], m % panel_rows, wanted[t]);
}

int64_t panels_of(const product::part &part) {
    return (part.weights->ne[1] + panel_rows - 1) / panel_rows;
}

/// Sets `rows` to the result's rows of a segment.
void point_to_results(const activation_set &set, const activation_set::segment &segment, const product::part &part,
                      float **rows) {
    for (int64_t t = 0; t < segment.count; ++t) {
        const char *row = flat_row(part.result, set.order[static_cast<size_t>(segment.first + t)]);
        rows[t] = const_cast<float *>(reinterpret_cast<const float *>(row));
    }
}

/// Multiplies panels [first, end) of a segment's matrix. The rows of `memory` point to the results of all panels.
void multiply_part(const activation_set &set, const activation_set::segment &segment, const product::part &part,
                   int64_t first, int64_t end, const product_memory &memory) {
    const int64_t m = part.weights->ne[1], k = set.x->ne[0];
    const int64_t full_end = std::min(end, m / panel_rows);
    const activation_buffer::parts packed = set.packed(segment.first);
    const matrix_attributes &a = *(*part.attributes)[static_cast<size_t>(segment.matrix)];
    const tile *matrix = matrix_at(part.weights->data, segment.matrix, m, k);
    gemm_args args;
    args.weights = panel_at(matrix, static_cast<int>(first), static_cast<int>(k / group_columns));
    args.k = static_cast<int>(k);
    args.panels = static_cast<int>(full_end - first);
    args.codebook = a.codebook;
    args.tensor_scale = a.header.tensor_scale;
    args.per_group = a.format.per_group;
    args.bits = segment.bits != 0 ? segment.bits : a.format.bits;
    args.q = packed.q;
    args.bias = packed.bias;
    args.scale = packed.scale;
    args.n_tokens = static_cast<int>(segment.count);
    args.dst = memory.rows;
    const auto move = [&](int64_t by) {
        for (int64_t t = 0; t < segment.count; ++t) memory.rows[t] += by;
    };
    move(first * panel_rows);
    if (args.panels > 0) multiply_panels(*set.kern, args, matrix);
    if (full_end < end) {
        move((full_end - first) * panel_rows);
        multiply_last_panel(*set.kern, args, matrix, m, memory);
        move((first - full_end) * panel_rows);
    }
    move(-first * panel_rows);
}

/// For a row of the product whose expert does not exist.
void fill_with_nan(const product &p, int64_t flat) {
    for (const product::part &part : p.parts) {
        float *row = const_cast<float *>(reinterpret_cast<const float *>(flat_row(part.result, flat)));
        std::fill_n(row, part.weights->ne[1], std::numeric_limits<float>::quiet_NaN());
    }
}

}  // namespace

size_t product::thread_bytes() const {
    return product_memory(*this, nullptr).bytes;
}

void product_node(ggml_tensor *, int ith, int nth, void *userdata) {
    product &p = *static_cast<product *>(userdata);
    const activation_set &set = *p.set;
    activation_set::segment of_token[activation_set::most_experts];
    const activation_set::segment *segments = set.one_token ? of_token : set.segments.data();
    const int64_t n_segments =
        set.one_token ? set.segments_of_token(of_token) : static_cast<int64_t>(set.segments.size());
    int64_t all_panels = 0;
    for (const product::part &part : p.parts) all_panels += panels_of(part);
    panel_queue queue(&p.next, all_panels, set.kern->panel_step, nth, set.ids ? set.ids->ne[1] : set.rows());
    int64_t all = 0;
    for (const product::part &part : p.parts) all += queue.grains(panels_of(part)) * n_segments;

    const product_memory memory(p, p.memory->of(ith));
    const product::part *part = p.parts.data();
    int64_t part_begin = 0;  // the number of the part's first grain
    int64_t current = -1;    // the segment that the rows in memory point to
    for (int64_t begin, end; queue.take(all, &begin, &end);) {
        while (begin < end) {
            const int64_t grains = queue.grains(panels_of(*part));
            if (begin >= part_begin + grains * n_segments) {
                part_begin += grains * n_segments;
                ++part;
                current = -1;
                continue;
            }
            const int64_t s = (begin - part_begin) / grains, first = (begin - part_begin) % grains;
            const int64_t count = std::min(end - begin, grains - first);
            const activation_set::segment &segment = segments[s];
            if (s != current) point_to_results(set, segment, *part, memory.rows);
            current = s;
            multiply_part(set, segment, *part, first * queue.grain(),
                          std::min((first + count) * queue.grain(), panels_of(*part)), memory);
            begin += count;
        }
    }
    if (ith != 0) return;
    for (int64_t flat : set.invalid) fill_with_nan(p, flat);
    if (!set.one_token || n_segments == set.rows()) return;
    for (int64_t flat = 0; flat < set.rows(); ++flat) {
        if (set.expert(flat) < 0) fill_with_nan(p, flat);
    }
}

void row_lookup_node(ggml_tensor *dst, int ith, int nth, void *userdata) {
    const row_lookup &lookup = *static_cast<row_lookup *>(userdata);
    const ggml_tensor *numbers = dst->src[0], *weights = dst->src[1];
    const matrix_attributes &a = *(*lookup.attributes)[0];
    const int64_t total = numbers->ne[0] * numbers->ne[1] * numbers->ne[2];
    for (int64_t i = ith; i < total; i += nth) {
        const int64_t i0 = i % numbers->ne[0], i1 = i / numbers->ne[0] % numbers->ne[1],
                      i2 = i / (numbers->ne[0] * numbers->ne[1]);
        const char *number = row_address(numbers, i1, i2, 0) + i0 * static_cast<int64_t>(numbers->nb[0]);
        const int64_t row = *reinterpret_cast<const int32_t *>(number);
        float *out = const_cast<float *>(reinterpret_cast<const float *>(row_address(dst, i0, i1, i2)));
        if (row >= 0 && row < weights->ne[1]) {
            dequantize_row(a, static_cast<const tile *>(weights->data), row, out);
        } else {
            std::fill_n(out, weights->ne[0], std::numeric_limits<float>::quiet_NaN());
        }
    }
}

}  // namespace agq
