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

/// How many panels a thread takes at a time: few enough to balance the threads, enough to amortize the packed
/// activations that each unit streams through the cache. With few tokens, each unit wastes what it prefetches past its
/// end. With many, threads wait at the end for the last unit.
int64_t panels_per_unit(int64_t panels, int64_t step, int nth, int64_t tokens) {
    const int64_t units = tokens < 64 ? 8 : 16;
    const int64_t wanted = std::max<int64_t>(1, panels / (nth * units));
    return std::max(step, wanted / step * step);
}

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

}  // namespace

size_t product::thread_bytes() const {
    return product_memory(*this, nullptr).bytes;
}

void product_node(ggml_tensor *, int ith, int nth, void *userdata) {
    product &p = *static_cast<product *>(userdata);
    const activation_set &set = *p.set;
    const int64_t k = set.x->ne[0], n_segments = static_cast<int64_t>(set.segments.size());
    const auto panels_of = [](const product::part &part) {
        return (part.weights->ne[1] + panel_rows - 1) / panel_rows;
    };
    int64_t all_panels = 0;
    for (const product::part &part : p.parts) all_panels += panels_of(part);
    const int64_t step = panels_per_unit(all_panels, set.kern->panel_step, nth, set.rows());

    const product_memory memory(p, p.memory->of(ith));
    float **rows = memory.rows;
    const product::part *part = p.parts.data(), *const parts_end = part + p.parts.size();
    int64_t begin = 0;  // the number of the part's first unit
    int64_t units = (panels_of(*part) + step - 1) / step;
    int64_t current = -1;  // the segment that `rows` point to
    for (;;) {
        const int64_t i = p.next.fetch_add(1, std::memory_order_relaxed);
        while (part != parts_end && i >= begin + units * n_segments) {
            begin += units * n_segments;
            current = -1;
            if (++part != parts_end) units = (panels_of(*part) + step - 1) / step;
        }
        if (part == parts_end) break;
        const int64_t m = part->weights->ne[1], full_panels = m / panel_rows, panels = panels_of(*part);
        const int64_t s = (i - begin) / units, first = (i - begin) % units * step;
        const activation_set::segment &segment = set.segments[static_cast<size_t>(s)];
        if (s != current) {
            for (int64_t t = 0; t < segment.count; ++t) {
                const char *row = flat_row(part->result, set.order[static_cast<size_t>(segment.first + t)]);
                rows[t] = const_cast<float *>(reinterpret_cast<const float *>(row));
            }
            current = s;
        }
        const activation_buffer::parts packed = set.packed(segment.first);
        const matrix_attributes &a = *(*part->attributes)[static_cast<size_t>(segment.matrix)];
        const tile *matrix = matrix_at(part->weights->data, segment.matrix, m, k);
        const int64_t end = std::min(first + step, panels), full_end = std::min(end, full_panels);
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
        args.dst = rows;
        const auto move = [&](int64_t by) {
            for (int64_t t = 0; t < segment.count; ++t) rows[t] += by;
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
    if (ith != 0) return;
    for (const product::part &each : p.parts) {
        for (int64_t flat : set.invalid) {
            float *row = const_cast<float *>(reinterpret_cast<const float *>(flat_row(each.result, flat)));
            std::fill_n(row, each.weights->ne[1], std::numeric_limits<float>::quiet_NaN());
        }
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
