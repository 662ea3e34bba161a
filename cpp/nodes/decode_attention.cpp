// Processes the cache in chunks and combines their results. Neither the chunks nor the order of combination depends on
// the number of threads, so the results do not either.
#include "nodes/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "host/tensor_rows.h"

namespace agq {

namespace {

/// Maximum number of chunks of a group: enough to balance some threads, few enough to read the cache in long runs.
constexpr int64_t most_chunks = 16;

constexpr uint64_t all_keys = ~uint64_t{0};

int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

/// Dimensions of a group.
struct few_shape {
    int64_t heads, group, tokens, rows, width, head_v, chunk_keys, chunks;

    few_shape(const attention_job &job, int64_t n_tokens, int64_t n_keys)
        : heads(job.k->ne[2]),
          group(job.group()),
          tokens(n_tokens),
          rows(tokens * group),
          width(round_up(job.q->ne[0], few_width_step)),
          head_v(job.value_width()),
          chunk_keys(round_up((std::max<int64_t>(n_keys, 1) + most_chunks - 1) / most_chunks, attention_keys)),
          chunks((std::max<int64_t>(n_keys, 1) + chunk_keys - 1) / chunk_keys) {}
    few_shape(const attention_job &job, const key_group &keys) : few_shape(job, keys.n_tokens, keys.n) {}

    /// Floats per head in a chunk's result: sums of values, largest scores, sums of weights.
    int64_t partial_floats() const { return rows * (head_v + 2); }
};

/// Layout of a thread's memory; all parts are multiples of a cache line.
struct few_memory {
    float *q, *keys, *values, *masks, *scores;  ///< q [head][rows][width]
    size_t bytes;

    few_memory(void *memory, const few_shape &s) {
        float *base = static_cast<float *>(memory), *next = base;
        const auto take = [&next](int64_t n) {
            float *at = next;
            next += round_up(n, 16);
            return at;
        };
        q = take(s.heads * s.rows * s.width);
        keys = take(attention_keys * s.width);
        values = take(attention_keys * s.head_v);
        masks = take(s.tokens * attention_keys);
        scores = take(s.rows * attention_keys);
        bytes = static_cast<size_t>(next - base) * sizeof(float);
    }
};

/// A block of keys in the cache, and where the next block begins.
struct key_range {
    int64_t first, next;
    uint64_t seen;  ///< bit i: whether any token sees key first + i
};

uint64_t find_seen(const few_args &args, const few_block &block) {
    uint64_t seen = 0;
    for (int t = block.begin; t < block.end; ++t) {
        for (int i = 0; i < block.n; ++i) {
            seen |= static_cast<uint64_t>(args.masks[t * attention_keys + i] != -INFINITY) << i;
        }
    }
    return seen;
}

/// Reads keys or values of a head as floats, `stride` floats apart. Keys that no token sees become zeros, since an
/// unused cell may hold anything. Prefetches the same rows of the next block.
void read_rows(const attention_job &job, const key_group &keys, const ggml_tensor *t, int64_t head,
               const key_range &range, int n, float *to, int64_t stride) {
    const int64_t width = t->ne[0], first = range.first;
    const bool at_once = t->type == ggml_type_f16 && keys.cell(first + n - 1) - keys.cell(first) == n - 1;
    if (at_once) {
        const char *from = row_address(t, keys.cell(first), head, keys.stream);
        job.kern->few->read_f16(from, t->nb[1], n, static_cast<int>(width), to, stride,
                                (range.next - first) * static_cast<int64_t>(t->nb[1]));
        if (range.seen == all_keys && width == stride) return;
    }
    for (int i = 0; i < n; ++i) {
        float *row = to + i * stride;
        if (!(range.seen >> i & 1)) {
            std::fill_n(row, width, 0.0f);
        } else if (!at_once) {
            read_row(*job.kern, t, row_address(t, keys.cell(first + i), head, keys.stream), row, width);
        }
        std::fill(row + width, row + stride, 0.0f);
    }
}

/// The same for a transposed value cache: [head_v][64].
void read_columns(const attention_job &job, const key_group &keys, int64_t head, const key_range &range, int n,
                  float *to) {
    for (int64_t d = 0; d < job.value_width(); ++d, to += attention_keys) {
        read_column(job, keys, row_address(job.v, d, head, keys.stream), range.first, n, to);
        for (int i = 0; range.seen != all_keys && i < attention_keys; ++i) {
            if (!(range.seen >> i & 1)) to[i] = 0;
        }
    }
}

/// Reads the queries of a group, scaled.
void read_queries(const attention_job &job, const few_shape &s, const key_group &keys, float *to) {
    const int64_t width = job.q->ne[0];
    for (int64_t head = 0; head < s.heads; ++head) {
        for (int64_t r = 0; r < s.rows; ++r, to += s.width) {
            const float *from = query(job, keys.first_token + r / s.group, head * s.group + r % s.group, keys.stream);
            for (int64_t d = 0; d < s.width; ++d) to[d] = d < width ? from[d] * job.scale : 0.0f;
        }
    }
}

/// Processes one chunk of a group, from key `first` to `last`. `partial` is the result of the first head. `after` is
/// the thread's probable next chunk, for prefetching.
void attend_chunk(const attention_job &job, const few_shape &s, const few_memory &memory, const key_group &keys,
                  int64_t first, int64_t last, int64_t after, float *partial) {
    few_args args = {};
    args.n_tokens = static_cast<int>(s.tokens);
    args.group = static_cast<int>(s.group);
    args.width = static_cast<int>(s.width);
    args.head_v = static_cast<int>(s.head_v);
    args.n_keys = keys.n;
    args.mask = keys.mask;
    args.mask_stride = keys.mask_stride;
    args.mask_is_f16 = job.mask_is_f16();
    args.soft_cap = job.soft_cap;
    args.masks = memory.masks;
    args.scores = memory.scores;
    float slopes[weights_row_limit];
    args.slopes = slopes;
    for (int64_t head = 0; head < s.heads; ++head) {
        float *at = partial + head * s.partial_floats();
        std::fill_n(at, s.partial_floats(), 0.0f);
        std::fill_n(at + s.rows * s.head_v, s.rows, -INFINITY);
    }
    for (; first < last; first += attention_keys) {
        few_block block = {};
        job.kern->few->read_masks(args, first, &block);
        if (block.begin >= block.end) continue;
        block.n = static_cast<int>(std::min<int64_t>(attention_keys, last - first));
        block.keys = memory.keys;
        block.values = memory.values;
        block.transposed = job.v_transposed;
        std::fill(memory.keys + block.n * s.width, memory.keys + attention_keys * s.width, 0.0f);
        const key_range range = {first, first + attention_keys < last ? first + attention_keys : after,
                                 find_seen(args, block)};
        for (int64_t head = 0; head < s.heads; ++head) {
            args.q = memory.q + head * s.rows * s.width;
            args.out = partial + head * s.partial_floats();
            args.maximum = args.out + s.rows * s.head_v;
            args.sum = args.maximum + s.rows;
            read_slopes(job, head * s.group, s.group, slopes);
            read_rows(job, keys, job.k, head, range, block.n, memory.keys, s.width);
            if (job.v_transposed) {
                read_columns(job, keys, head, range, block.n, memory.values);
            } else {
                read_rows(job, keys, job.v, head, range, block.n, memory.values, s.head_v);
            }
            job.kern->few->attend(args, block);
        }
    }
}

/// Combines the chunks of a head; `partial` is the first one's result.
void combine(const attention_job &job, const few_shape &s, const float *partial, int64_t step, int64_t head,
             const key_group &keys, float *dst) {
    const float *sinks = job.sinks ? static_cast<const float *>(job.sinks->data) + head * s.group : nullptr;
    for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t token = r / s.group, g = r % s.group;
        const auto maximum = [&](int64_t c) { return partial[c * step + s.rows * s.head_v + r]; };
        float top = sinks ? sinks[g] : -INFINITY;
        for (int64_t c = 0; c < s.chunks; ++c) top = std::max(top, maximum(c));
        const auto weight = [&](float score) { return score == top ? 1.0f : std::exp(score - top); };
        float total = sinks ? weight(sinks[g]) : 0.0f, weights[most_chunks];
        for (int64_t c = 0; c < s.chunks; ++c) {
            weights[c] = weight(maximum(c));
            total += weights[c] * partial[c * step + s.rows * (s.head_v + 1) + r];
        }
        float *out = dst + (keys.first_token + token) * job.out_token_stride +
                     (head * s.group + g) * job.out_head_stride + keys.stream * job.out_stream_stride;
        std::fill_n(out, s.head_v, 0.0f);
        if (total == 0) continue;
        for (int64_t c = 0; c < s.chunks; ++c) {
            const float factor = weights[c] / total, *from = partial + c * step + r * s.head_v;
            for (int64_t d = 0; d < s.head_v; ++d) out[d] += factor * from[d];
        }
    }
}

}  // namespace

bool suits_few(const attention_job &job, int64_t tokens) {
    const int64_t rows = tokens * job.group();
    return job.kern->few && rows <= weights_row_limit && (rows < 32 || tokens < 4);
}

size_t few_bytes(const attention_job &job) {
    int64_t most = 0;
    while (most < job.tokens() && suits_few(job, most + 1)) ++most;
    alignas(64) float none[16];
    return few_memory(none, few_shape(job, most, 1)).bytes;  // only computes addresses; no memory is accessed
}

int64_t few_chunks(const attention_job &job, const key_group &keys) {
    return few_shape(job, keys).chunks;
}

int64_t few_partial_floats(const attention_job &job, const key_group &keys) {
    const few_shape s(job, keys);
    return s.partial_floats() * s.heads * s.chunks;
}

void few_worker::run(const attention_part &part, int64_t chunk, int nth, std::atomic<int> *finished, float *dst) {
    const few_shape s(job_, part.keys);
    const few_memory memory(memory_, s);
    const int64_t step = s.heads * s.partial_floats(), first = chunk * s.chunk_keys;
    float *partials = job_.partial->data() + part.partial;
    if (part_ != &part) read_queries(job_, s, part.keys, memory.q);
    part_ = &part;
    attend_chunk(job_, s, memory, part.keys, first, std::min(part.keys.n, first + s.chunk_keys),
                 first + nth * s.chunk_keys, partials + chunk * step);
    // The last thread to arrive sees what the others have written.
    if (finished->fetch_add(1, std::memory_order_acq_rel) + 1 < s.chunks) return;
    for (int64_t head = 0; head < s.heads; ++head) {
        combine(job_, s, partials + head * s.partial_floats(), step, head, part.keys, dst);
    }
}

}  // namespace agq
