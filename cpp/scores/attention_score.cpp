#include "scores/attention_score.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "graph/mask_view.h"

namespace agq {

namespace {

constexpr double fixed_one = 4294967296.0;  // 2^32: sums of up to 2^31 weights fit

/// What a thread keeps, in floats and multiples of a cache line.
struct parts {
    int64_t padded;
    size_t keys, queries, row, weights, mask;

    explicit parts(const attention_job &job) {
        const int64_t width = job.q->ne[0], n_keys = job.k->ne[1];
        const auto round = [](size_t floats) { return (floats + 15) / 16 * 16; };
        padded = (n_keys + attention_keys - 1) / attention_keys * attention_keys;
        keys = static_cast<size_t>(padded * width);
        queries = round(static_cast<size_t>(weights_row_limit * width));
        row = round(static_cast<size_t>(width));
        weights = static_cast<size_t>(weights_row_limit * padded);
        mask = round(static_cast<size_t>(weights_row_limit) * job.mask->nb[1] / sizeof(float) + 1);
    }
    size_t bytes() const { return (keys + queries + row + weights + mask) * sizeof(float); }
};

/// All keys of a head as the kernel wants them. `row` holds one key.
void pack_keys(const attention_job &job, int64_t head, float *row, float *packed) {
    const int64_t width = job.k->ne[0], n = job.k->ne[1], blocks = (n + attention_keys - 1) / attention_keys;
    std::memset(packed + (blocks - 1) * width * attention_keys, 0,
                sizeof(float) * static_cast<size_t>(width) * attention_keys);
    for (int64_t i = 0; i < n; ++i) {
        const char *key = static_cast<const char *>(job.k->data) + static_cast<size_t>(i) * job.k->nb[1] +
                          static_cast<size_t>(head) * job.k->nb[2];
        read_row(*job.kern, job.k, key, row, width);
        float *to = packed + i / attention_keys * width * attention_keys + i % attention_keys;
        for (int64_t d = 0; d < width; ++d) to[d * attention_keys] = row[d];
    }
}

/// The rows whose attention is looked at, as a range of job.rows.
int64_t first_query(const importance_job &job) {
    const int64_t n = static_cast<int64_t>(job.rows.size());
    return job.score == prune_score::recent ? std::max<int64_t>(0, n - recent_queries) : 0;
}

/// Adds what `tokens` rows from `first` on (indices into job.rows) say, for one head of keys. `weights` are theirs, and
/// `visible` the keys that they see.
void add_weights(const importance_job &job, int64_t first, int64_t tokens, int64_t group, const int64_t *visible,
                 float *weights, int64_t padded, std::vector<int64_t> *sums) {
    const auto fixed = [](double x) { return static_cast<int64_t>(std::llrint(x * fixed_one)); };
    const size_t n = job.rows.size();
    if (job.score == prune_score::first) {
        for (int64_t r = 0; r < tokens * group; ++r) {
            const float w = weights[r * padded + job.first_cell];
            (*sums)[static_cast<size_t>(first + r / group)] += fixed(std::isnan(w) ? 0.0 : w);
        }
        return;
    }
    float *total = weights;  // the first row becomes the sum of all
    for (int64_t r = 0; r < tokens * group; ++r) {
        const size_t token = static_cast<size_t>(first + r / group);
        float *row = weights + r * padded;
        const float scale = job.score == prune_score::recent ? static_cast<float>(visible[r / group]) : 1.0f;
        if (job.score == prune_score::received) row[job.cells[token]] = 0;  // only later tokens count
        if (r == 0) {
            for (int64_t j = 0; j < padded; ++j) total[j] *= scale;
        } else {
            for (int64_t j = 0; j < padded; ++j) total[j] += row[j] * scale;
        }
    }
    for (size_t i = 0; i < n; ++i) {
        const float sum = total[job.cells[i]];
        (*sums)[i] += fixed(std::isnan(sum) ? 0.0 : sum);
    }
}

}  // namespace

bool plan_importance(const attention_site &site, const ggml_tensor *mask, const attention_kernel *kern,
                     attention_job *job) {
    if (!kern || !site.plain) return false;
    job->kern = kern;
    static_cast<attention_operands &>(*job) = site;
    job->mask = mask;
    job->saved_q = nullptr;
    const ggml_tensor *q = site.q, *k = site.k;
    const ggml_type_traits *k_type = host.ggml_get_type_traits(k->type);
    const bool readable = k->type == ggml_type_f32 || k->type == ggml_type_f16 || k_type->to_float;
    return readable && q->type == ggml_type_f32 && q->nb[0] == 4 && q->ne[3] == 1 && k->ne[3] == 1 &&
           k->ne[0] == q->ne[0] && k->ne[2] > 0 && q->ne[2] % k->ne[2] == 0 &&
           q->ne[2] / k->ne[2] <= weights_row_limit && k->nb[0] == k_type->type_size &&
           (mask->type == ggml_type_f16 || mask->type == ggml_type_f32) && mask->ne[0] == k->ne[1] &&
           mask->ne[2] == 1 && mask->ne[3] == 1 &&
           (!site.sinks || (site.sinks->type == ggml_type_f32 && site.sinks->ne[0] == q->ne[2]));
}

void importance_job::prepare(int threads) {
    memory.reserve(parts(attention).bytes(), threads);
    sums.resize(static_cast<size_t>(threads));
    for (auto &part : sums) part.assign(rows.size(), 0);
    visible.assign(rows.size(), 0);
    next.store(0, std::memory_order_relaxed);
}

void importance_node(ggml_tensor *, int ith, int, void *userdata) {
    importance_job &job = *static_cast<importance_job *>(userdata);
    const attention_job &a = job.attention;
    const int64_t heads = a.k->ne[2], group = a.q->ne[2] / heads, width = a.q->ne[0];
    const int64_t begin = first_query(job), n = static_cast<int64_t>(job.rows.size());
    // Blocks are the same for any number of threads, and so are the sums of each.
    const int64_t block_tokens = std::max<int64_t>(1, weights_row_limit / group);
    const int64_t blocks = (n - begin + block_tokens - 1) / block_tokens;

    const parts size(a);
    float *keys = static_cast<float *>(job.memory.of(ith));
    float *queries = keys + size.keys, *row = queries + size.queries, *weights = row + size.row;
    char *mask = reinterpret_cast<char *>(weights + size.weights);
    float slopes[weights_row_limit];
    const size_t mask_bytes = a.mask->nb[1];
    const bool is_f16 = a.mask->type == ggml_type_f16;
    int64_t visible[weights_row_limit] = {};

    int64_t packed = -1;
    for (int64_t unit; (unit = job.next.fetch_add(1, std::memory_order_relaxed)) < heads * blocks;) {
        const int64_t head = unit / blocks, first = begin + unit % blocks * block_tokens;
        const int64_t tokens = std::min(block_tokens, n - first);
        if (packed != head) {
            pack_keys(a, head, row, keys);
            read_slopes(a, head * group, group, slopes);
            packed = head;
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t token = job.rows[static_cast<size_t>(first + t)];
            std::memcpy(mask + static_cast<size_t>(t) * mask_bytes,
                        static_cast<const char *>(a.mask->data) + static_cast<size_t>(token) * mask_bytes, mask_bytes);
            if (job.score == prune_score::recent || (job.score == prune_score::received && head == 0)) {
                visible[t] = mask_row(mask + static_cast<size_t>(t) * mask_bytes, is_f16).count_visible(a.k->ne[1]);
            }
            if (head == 0) job.visible[static_cast<size_t>(first + t)] = visible[t];
            for (int64_t g = 0; g < group; ++g) {
                const float *from = reinterpret_cast<const float *>(static_cast<const char *>(a.q->data) +
                                                                    static_cast<size_t>(token) * a.q->nb[1] +
                                                                    static_cast<size_t>(head * group + g) * a.q->nb[2]);
                float *to = queries + (t * group + g) * width;
                for (int64_t d = 0; d < width; ++d) to[d] = from[d] * a.scale;
            }
        }
        softmax_weights_args args = {};
        args.n_tokens = static_cast<int>(tokens);
        args.group = static_cast<int>(group);
        args.head = static_cast<int>(width);
        args.q = queries;
        args.n_keys = a.k->ne[1];
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
        add_weights(job, first, tokens, group, visible, weights, size.padded, &job.sums[static_cast<size_t>(ith)]);
    }
}

std::vector<float> importance_job::result() const {
    const size_t n = rows.size(), begin = static_cast<size_t>(first_query(*this));
    const double heads = static_cast<double>(attention.q->ne[2]);
    std::vector<float> importance(n);
    double evenly = 0;  // what the tokens behind this one would give if they spread their attention evenly
    for (size_t i = n; i-- > 0;) {
        int64_t fixed = 0;
        for (const auto &part : sums) fixed += part[i];
        double value = static_cast<double>(fixed) / fixed_one / heads;
        if (score == prune_score::received) value /= evenly;  // not a number for the last token
        if (score == prune_score::recent) value /= static_cast<double>(n - begin);
        importance[i] = static_cast<float>(value);
        if (score == prune_score::received && visible[i] > 0) evenly += 1.0 / static_cast<double>(visible[i]);
    }
    return importance;
}

}  // namespace agq
