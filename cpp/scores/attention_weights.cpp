#include "scores/attention_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "graph/mask_view.h"

namespace agq {

namespace {

constexpr double fixed_one = 4294967296.0;  // 2^32: sums of up to 2^31 weights fit

/// Layout of a thread's memory, in floats and multiples of a cache line.
struct parts {
    int64_t padded;
    size_t keys, queries, row, weights, mask;

    parts(const attention_job &job, int64_t n_keys) {
        const int64_t width = job.q->ne[0];
        const auto round = [](size_t floats) { return (floats + 15) / 16 * 16; };
        padded = (n_keys + attention_keys - 1) / attention_keys * attention_keys;
        keys = static_cast<size_t>(padded * width);
        queries = round(static_cast<size_t>(weights_row_limit * width));
        row = round(static_cast<size_t>(width));
        weights = static_cast<size_t>(weights_row_limit * padded);
        mask = round(static_cast<size_t>(weights_row_limit * n_keys) * job.mask->nb[0] / sizeof(float) + 1);
    }
    size_t bytes() const { return (keys + queries + row + weights + mask) * sizeof(float); }
};

/// Packs all keys of a head for the kernel. `row` has room for one key.
void pack_keys(const attention_job &job, const key_group &keys, int64_t head, float *row, float *packed) {
    const int64_t width = job.k->ne[0], n = keys.n, blocks = (n + attention_keys - 1) / attention_keys;
    std::memset(packed + (blocks - 1) * width * attention_keys, 0,
                sizeof(float) * static_cast<size_t>(width) * attention_keys);
    for (int64_t i = 0; i < n; ++i) {
        const char *key = static_cast<const char *>(job.k->data) + static_cast<size_t>(keys.cell(i)) * job.k->nb[1] +
                          static_cast<size_t>(head) * job.k->nb[2];
        read_row(*job.kern, job.k, key, row, width);
        float *to = packed + i / attention_keys * width * attention_keys + i % attention_keys;
        for (int64_t d = 0; d < width; ++d) to[d * attention_keys] = row[d];
    }
}

}  // namespace

bool plan_weights(const attention_site &site, const attention_kernel *kern, attention_job *job) {
    if (!kern || !site.is_known) return false;
    job->kern = kern;
    static_cast<attention_operands &>(*job) = site;
    job->saved_q = nullptr;
    const ggml_tensor *q = site.q, *k = site.k, *mask = site.mask;
    const ggml_type_traits *k_type = host.ggml_get_type_traits(k->type);
    const bool readable = k->type == ggml_type_f32 || k->type == ggml_type_f16 || k_type->to_float;
    return readable && q->type == ggml_type_f32 && q->nb[0] == 4 && q->ne[3] == 1 && k->ne[3] == 1 &&
           k->ne[0] == q->ne[0] && k->ne[2] > 0 && q->ne[2] % k->ne[2] == 0 &&
           q->ne[2] / k->ne[2] <= weights_row_limit && k->nb[0] == k_type->type_size &&
           (mask->type == ggml_type_f16 || mask->type == ggml_type_f32) && mask->ne[0] == k->ne[1] &&
           mask->ne[2] == 1 && mask->ne[3] == 1 &&
           (!site.sinks || (site.sinks->type == ggml_type_f32 && site.sinks->ne[0] == q->ne[2]));
}

int64_t attention_meter::fixed_point(float weight) {
    return static_cast<int64_t>(std::llrint((std::isnan(weight) ? 0.0 : weight) * fixed_one));
}

int64_t weight_visitor::first_query() const {
    const int64_t n = static_cast<int64_t>(tokens.rows.size());
    return last_queries_ == all_queries ? 0 : std::max<int64_t>(0, n - last_queries_);
}

void attention_meter::add_rows(const weight_block &block, const int64_t *scales, std::vector<int64_t> *sums) const {
    float *total = block.weights;  // the first row is overwritten with the sum of all rows
    for (int64_t r = 0; r < block.n_tokens * block.group; ++r) {
        const float *row = block.weights + r * block.stride;
        const int64_t token = r / block.group;
        const float scale = scales ? static_cast<float>(scales[token]) : 1.0f;
        if (r == 0) {
            for (int64_t j = 0; j < block.stride; ++j) total[j] *= scale;
        } else {
            for (int64_t j = 0; j < block.stride; ++j) total[j] += row[j] * scale;
        }
    }
    for (size_t i = 0; i < columns().size(); ++i) {
        if (columns()[i] != no_column) (*sums)[i] += fixed_point(total[columns()[i]]);
    }
}

void attention_meter::prepare(const score_source &source, int threads) {
    weight_visitor::prepare(source, threads);
    sums_.resize(static_cast<size_t>(threads));
    for (auto &part : sums_) part.assign(tokens.rows.size(), 0);
}

void weight_visitor::prepare(const score_source &source, int threads) {
    plan_weights(source.site, kern_, &attention_);
    keys_ = source.keys;
    if (keys_.n == 0) {
        keys_.n = attention_.k->ne[1];
        keys_.mask = static_cast<const char *>(attention_.mask->data);
        keys_.mask_stride = attention_.mask->nb[1];
    }
    columns_.resize(tokens.cells.size());
    for (size_t i = 0; i < columns_.size(); ++i) {
        columns_[i] = keys_.column_of(tokens.cells[i], i == 0 ? 0 : columns_[i - 1] + 1);
    }
    first_column_ = keys_.column_of(tokens.first_cell);
    memory_.reserve(parts(attention_, keys_.n).bytes(), threads);
    visible_.assign(tokens.rows.size(), 0);
    first_seen_.assign(tokens.rows.size(), 0);
    next_.store(0, std::memory_order_relaxed);
}

void weight_visitor::run(int ith, int) {
    const attention_job &a = attention_;
    const int64_t heads = a.k->ne[2], group = a.q->ne[2] / heads, width = a.q->ne[0];
    const int64_t begin = first_query(), n = static_cast<int64_t>(tokens.rows.size());
    // Blocks and their sums do not depend on the number of threads.
    const int64_t block_tokens = std::max<int64_t>(1, weights_row_limit / group);
    const int64_t blocks = (n - begin + block_tokens - 1) / block_tokens;

    const parts size(a, keys_.n);
    float *keys = static_cast<float *>(memory_.of(ith));
    float *queries = keys + size.keys, *row = queries + size.queries, *weights = row + size.row;
    char *mask = reinterpret_cast<char *>(weights + size.weights);
    float slopes[weights_row_limit];
    const size_t mask_bytes = static_cast<size_t>(keys_.n) * a.mask->nb[0];
    const bool is_f16 = a.mask->type == ggml_type_f16;
    int64_t visible[weights_row_limit] = {};

    int64_t packed = -1;
    for (int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < heads * blocks;) {
        const int64_t head = unit / blocks, first = begin + unit % blocks * block_tokens;
        if (!wants(head * group, group)) continue;
        const int64_t n_tokens = std::min(block_tokens, n - first);
        if (packed != head) {
            pack_keys(a, keys_, head, row, keys);
            read_slopes(a, head * group, group, slopes);
            packed = head;
        }
        for (int64_t t = 0; t < n_tokens; ++t) {
            const int64_t token = tokens.rows[static_cast<size_t>(first + t)];
            std::memcpy(mask + static_cast<size_t>(t) * mask_bytes,
                        keys_.mask + static_cast<size_t>(token - keys_.first_token) * keys_.mask_stride, mask_bytes);
            if (counted_ == visible_keys::always || (counted_ == visible_keys::once && head == 0)) {
                visible[t] = mask_row(mask + static_cast<size_t>(t) * mask_bytes, is_f16).count_visible(keys_.n);
            }
            if (head == 0) visible_[static_cast<size_t>(first + t)] = visible[t];
            if (head == 0 && counted_ == visible_keys::once) {
                const mask_row seen(mask + static_cast<size_t>(t) * mask_bytes, is_f16);
                const auto hides = [&seen](int32_t column) { return column == no_column || seen.hides(column); };
                const auto own = columns_.begin() + first + t;
                const auto from = std::partition_point(columns_.begin(), own, hides);
                first_seen_[static_cast<size_t>(first + t)] = static_cast<size_t>(from - columns_.begin());
            }
            for (int64_t g = 0; g < group; ++g) {
                const float *from = reinterpret_cast<const float *>(static_cast<const char *>(a.q->data) +
                                                                    static_cast<size_t>(token) * a.q->nb[1] +
                                                                    static_cast<size_t>(head * group + g) * a.q->nb[2]);
                float *to = queries + (t * group + g) * width;
                for (int64_t d = 0; d < width; ++d) to[d] = from[d] * a.scale;
            }
        }
        softmax_weights_args args = {};
        args.n_tokens = static_cast<int>(n_tokens);
        args.group = static_cast<int>(group);
        args.head = static_cast<int>(width);
        args.q = queries;
        args.n_keys = keys_.n;
        args.keys = keys;
        args.mask = mask;
        args.mask_stride = mask_bytes;
        args.mask_is_f16 = is_f16;
        args.slopes = slopes;
        args.soft_cap = a.soft_cap;
        args.sinks = a.sinks ? static_cast<const float *>(a.sinks->data) + head * group : nullptr;
        args.weights = weights;
        args.stride = size.padded;
        a.kern->weights(args);
        visit({head * group, first, n_tokens, group, visible, weights, size.padded}, ith);
    }
}

std::vector<float> attention_meter::result() const {
    const double heads = static_cast<double>(query_heads());
    std::vector<double> values(tokens.rows.size());
    for (size_t i = 0; i < values.size(); ++i) {
        int64_t sum = 0;
        for (const auto &part : sums_) sum += part[i];
        values[i] = static_cast<double>(sum) / fixed_one / heads;
    }
    finish(&values);
    std::vector<float> importance;
    importance.reserve(values.size());
    for (double value : values) importance.push_back(static_cast<float>(value));
    return importance;
}

}  // namespace agq
