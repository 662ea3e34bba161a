// Plans attention jobs, and runs those with many rows. The unit of work is a range of tokens of one key/value head. A
// thread packs the head's keys and values once, into its own memory, and then processes its tokens in blocks.
#include "nodes/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "host/tensor_rows.h"
#include "nodes/decode_attention.h"

namespace agq {

namespace {

// With fewer rows, packing the keys costs more than it saves.
constexpr int64_t least_rows = 32;
constexpr int64_t least_tokens = 4;

using to_float_fn = void (*)(const void *, float *, int64_t);

bool readable(const ggml_tensor *t) {
    return t->type == ggml_type_f32 || t->type == ggml_type_f16 || host.ggml_get_type_traits(t->type)->to_float;
}

/// Checks what both forms require.
bool covered(const attention_job &job) {
    const ggml_tensor *q = job.q, *k = job.k, *v = job.v, *mask = job.mask;
    const int64_t head_v = job.value_width(), n_keys = k->ne[1];
    const ggml_type_traits *v_type = host.ggml_get_type_traits(v->type);
    const bool shapes = k->ne[0] == q->ne[0] && q->ne[0] <= attention_head_limit &&
                        (job.v_transposed ? v->ne[0] : v->ne[1]) == n_keys && k->ne[2] > 0 &&
                        q->ne[2] % k->ne[2] == 0 && v->ne[2] == k->ne[2] && k->ne[3] == q->ne[3] &&
                        v->ne[3] == q->ne[3] && head_v % 16 == 0 && q->ne[2] / k->ne[2] <= attention_row_limit;
    const bool types = q->type == ggml_type_f32 && q->nb[0] == 4 && readable(k) && readable(v) &&
                       k->nb[0] == host.ggml_get_type_traits(k->type)->type_size && v->nb[0] == v_type->type_size &&
                       (!job.v_transposed || v_type->blck_size == 1);
    const bool masked =
        !mask || ((mask->type == ggml_type_f32 || mask->type == ggml_type_f16) && mask->ne[0] >= n_keys &&
                  mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 && (mask->ne[3] == 1 || mask->ne[3] == q->ne[3]) &&
                  mask->nb[0] == host.ggml_get_type_traits(mask->type)->type_size);
    const bool sinks = !job.sinks || (job.sinks->type == ggml_type_f32 && job.sinks->ne[0] == q->ne[2]);
    if (!shapes || !types || !masked || !sinks || (job.max_bias != 0 && !mask)) return false;
    return suits_few(job, q->ne[1]) || job.any_length ||
           (q->ne[1] >= least_tokens && q->ne[1] * (q->ne[2] / k->ne[2]) >= least_rows);
}

/// Packs all keys of a head.
void pack_keys(const attention_job &job, const key_group &keys, int64_t head, float *rows, char *packed) {
    const int64_t width = job.k->ne[0], n_keys = keys.n;
    const size_t block_bytes = job.kern->key_bytes(static_cast<int>(width));
    for (int64_t first = 0; first < n_keys; first += attention_keys, packed += block_bytes) {
        const int64_t n = std::min<int64_t>(attention_keys, n_keys - first);
        for (int64_t i = 0; i < n; ++i) {
            read_row(*job.kern, job.k, row_address(job.k, keys.cell(first + i), head, keys.stream), rows + i * width,
                     width);
        }
        job.kern->pack_keys(rows, static_cast<int>(n), static_cast<int>(width), packed);
    }
}

/// Packs all values of a head.
void pack_values(const attention_job &job, const key_group &keys, int64_t head, float *rows, char *packed) {
    const ggml_tensor *v = job.v;
    const int64_t n_keys = keys.n, width = job.value_width();
    const size_t block_bytes = job.kern->value_bytes(static_cast<int>(width));
    float column[attention_keys];
    for (int64_t first = 0; first < n_keys; first += attention_keys, packed += block_bytes) {
        const int64_t n = std::min<int64_t>(attention_keys, n_keys - first);
        for (int64_t d = 0; job.v_transposed && d < width; ++d) {
            read_column(job, keys, row_address(v, d, head, keys.stream), first, n, column);
            for (int64_t i = 0; i < n; ++i) rows[i * width + d] = column[i];
        }
        for (int64_t i = 0; !job.v_transposed && i < n; ++i) {
            read_row(*job.kern, v, row_address(v, keys.cell(first + i), head, keys.stream), rows + i * width, width);
        }
        job.kern->pack_values(rows, static_cast<int>(n), static_cast<int>(width), packed);
    }
}

/// Layout of a thread's memory for one head; sizes in bytes, multiples of a cache line.
struct parts {
    size_t scratch, keys, values, queries, rows;

    explicit parts(const attention_job &job) {
        const int width = static_cast<int>(job.q->ne[0]), head_v = static_cast<int>(job.value_width());
        const size_t blocks = static_cast<size_t>((job.k->ne[1] + attention_keys - 1) / attention_keys);
        const auto floats = [](int64_t n) { return (static_cast<size_t>(n) * sizeof(float) + 63) / 64 * 64; };
        scratch = job.kern->scratch_bytes(width, head_v);
        keys = blocks * job.kern->key_bytes(width);
        values = blocks * job.kern->value_bytes(head_v);
        queries = floats(attention_row_limit * width);
        rows = floats(attention_keys * std::max(width, head_v));
    }
    size_t total() const { return scratch + keys + values + queries + rows; }
};

int64_t block_tokens(const attention_job &job) {
    return std::max<int64_t>(1, attention_row_limit / job.group());
}

/// Tokens of a range of a part, a multiple of the kernel's blocks: the last bit of a row may depend on its neighbours
/// in a block, which must not depend on other parts or on the number of threads. `units`: how many units all parts have
/// if none is divided.
int64_t range_tokens(const attention_job &job, int64_t tokens, int64_t units, int threads) {
    // Four units per thread balance the load. Ranges of fewer than 128 rows are not worth the packing.
    const int64_t wanted = (4 * threads + units - 1) / units;
    const int64_t most = std::max<int64_t>(1, tokens * job.group() / 128);
    const int64_t ranges = std::min(wanted, most), block = block_tokens(job);
    return ((tokens + ranges - 1) / ranges + block - 1) / block * block;
}

/// Runs the units of parts with many rows, and keeps the packed head of the latest.
class packed_worker {
  public:
    packed_worker(const attention_job &job, void *memory) : job_(job), size_(job) {
        scratch_ = static_cast<char *>(memory);
        keys_ = scratch_ + size_.scratch;
        values_ = keys_ + size_.keys;
        queries_ = reinterpret_cast<float *>(values_ + size_.values);
        rows_ = reinterpret_cast<float *>(values_ + size_.values + size_.queries);
    }
    void run(const attention_part &part, int64_t unit, float *dst);
    /// The memory has been used for something else.
    void forget() { part_ = nullptr; }

  private:
    const attention_job &job_;
    const parts size_;
    char *scratch_, *keys_, *values_;
    float *queries_, *rows_;
    float slopes_[attention_row_limit];
    const attention_part *part_ = nullptr;
    int64_t head_ = -1;
};

void packed_worker::run(const attention_part &part, int64_t unit, float *dst) {
    const int64_t group = job_.group(), width = job_.q->ne[0];
    const int64_t head = unit / part.ranges, stream = part.keys.stream, block = block_tokens(job_);
    if (part_ != &part || head_ != head) {
        pack_keys(job_, part.keys, head, rows_, keys_);
        pack_values(job_, part.keys, head, rows_, values_);
        read_slopes(job_, head * group, group, slopes_);
        part_ = &part;
        head_ = head;
    }
    const int64_t first = unit % part.ranges * part.range_tokens;
    const int64_t last = part.keys.first_token + std::min(part.keys.n_tokens, first + part.range_tokens);
    for (int64_t t = part.keys.first_token + first; t < last; t += block) {
        const int64_t n = std::min(block, last - t);
        for (int64_t r = 0; r < n * group; ++r) {
            const float *from = query(job_, t + r / group, head * group + r % group, stream);
            for (int64_t d = 0; d < width; ++d) queries_[r * width + d] = from[d] * job_.scale;
        }
        attention_args args = {};
        args.n_tokens = static_cast<int>(n);
        args.group = static_cast<int>(group);
        args.head_qk = static_cast<int>(width);
        args.head_v = static_cast<int>(job_.value_width());
        args.q = queries_;
        args.n_keys = part.keys.n;
        args.keys = keys_;
        args.values = values_;
        if (part.keys.mask) {
            args.mask = part.keys.mask + static_cast<size_t>(t - part.keys.first_token) * part.keys.mask_stride;
        }
        args.mask_stride = part.keys.mask_stride;
        args.mask_is_f16 = job_.mask_is_f16();
        args.slopes = slopes_;
        args.soft_cap = job_.soft_cap;
        args.sinks = job_.sinks ? static_cast<const float *>(job_.sinks->data) + head * group : nullptr;
        args.out =
            dst + t * job_.out_token_stride + head * group * job_.out_head_stride + stream * job_.out_stream_stride;
        args.out_token_stride = job_.out_token_stride;
        args.out_head_stride = job_.out_head_stride;
        args.scratch = scratch_;
        job_.kern->attend(args);
    }
}

}  // namespace

int32_t key_group::column_of(int32_t cell, int64_t next) const {
    if (!cells) {
        const int64_t column = cell - first_cell;
        return cell >= 0 && column >= 0 && column < n ? static_cast<int32_t>(column) : no_column;
    }
    if (next >= 0 && next < n && cells[next] == cell) return static_cast<int32_t>(next);
    const int32_t *end = cells + n, *found = std::lower_bound(cells, end, cell);
    return found != end && *found == cell ? static_cast<int32_t>(found - cells) : no_column;
}

void read_row(const attention_kernel &kern, const ggml_tensor *t, const char *from, float *to, int64_t n) {
    if (t->type == ggml_type_f32) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    } else if (t->type == ggml_type_f16) {
        kern.f16_to_f32(reinterpret_cast<const uint16_t *>(from), to, n);
    } else {
        reinterpret_cast<to_float_fn>(host.ggml_get_type_traits(t->type)->to_float)(from, to, n);
    }
}

void read_column(const attention_job &job, const key_group &keys, const char *row, int64_t first, int64_t n,
                 float *column) {
    const size_t element = host.ggml_get_type_traits(job.v->type)->type_size;
    const int64_t begin = keys.cell(first), span = keys.cell(first + n - 1) + 1 - begin;
    const char *from = row + static_cast<size_t>(begin) * element;
    if (span == n) {
        read_row(*job.kern, job.v, from, column, n);
        return;
    }
    // Chosen keys are usually close together: convert everything from the first to the last.
    float between[4 * attention_keys];
    if (span <= 4 * attention_keys) read_row(*job.kern, job.v, from, between, span);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = keys.cell(first + i) - begin;
        if (span <= 4 * attention_keys) {
            column[i] = between[at];
        } else {
            read_row(*job.kern, job.v, from + static_cast<size_t>(at) * element, column + i, 1);
        }
    }
}

const float *query(const attention_job &job, int64_t token, int64_t head, int64_t stream) {
    if (job.saved_q) {
        const ggml_tensor *q = job.q;
        return job.saved_q + ((stream * q->ne[2] + head) * q->ne[1] + token) * q->ne[0];
    }
    return reinterpret_cast<const float *>(row_address(job.q, token, head, stream));
}

bool attention_job::mask_is_f16() const {
    return mask && mask->type == ggml_type_f16;
}

void read_slopes(const attention_job &job, int64_t first, int64_t group, float *slopes) {
    const int64_t n_head = job.q->ne[2];
    const double power = std::exp2(std::floor(std::log2(static_cast<double>(n_head))));
    const double m0 = std::exp2(-job.max_bias / power), m1 = std::exp2(-job.max_bias / 2 / power);
    for (int64_t g = 0; g < group; ++g) {
        const double h = static_cast<double>(first + g);
        const double slope = h < power ? std::pow(m0, h + 1) : std::pow(m1, 2 * (h - power) + 1);
        slopes[g] = job.max_bias > 0 ? static_cast<float>(slope) : 1.0f;
    }
}

bool parse_attention_option(const std::string &text, const attention_kernel **kern, std::string *error) {
    *kern = nullptr;
    if (text.empty()) return true;
    if (text == "paper") *kern = AGQ_ATTENTION(attention_paper);
    if (text == "paper-normalized") *kern = AGQ_ATTENTION(attention_paper_normalized);
    if (*kern) return true;
    *error = "AGQ_ATTENTION must be paper or paper-normalized, in a build by GCC or Clang, got '" + text + "'";
    return false;
}

size_t attention_bytes(const attention_job &job) {
    // No group has more tokens than the job.
    return suits_few(job, job.tokens()) ? few_bytes(job) : std::max(few_bytes(job), parts(job).total());
}

size_t packed_attention_bytes(const attention_job &job) {
    return parts(job).total();
}

void begin_attention(attention_job *planned, const std::vector<key_group> *groups, int threads) {
    attention_job &job = *planned;
    job.next.store(0, std::memory_order_relaxed);
    job.parts.clear();
    if (groups) {
        for (const key_group &keys : *groups) job.parts.emplace_back().keys = keys;
    }
    for (int64_t stream = 0; !groups && stream < job.q->ne[3]; ++stream) {
        key_group &keys = job.parts.emplace_back().keys;
        keys.stream = stream;
        keys.n_tokens = job.tokens();
        keys.n = job.k->ne[1];
        if (!job.mask) continue;
        keys.mask = row_address(job.mask, 0, 0, job.mask->ne[3] == 1 ? 0 : stream);
        keys.mask_stride = job.mask->nb[1];
    }
    const int64_t heads = job.k->ne[2];
    size_t floats = 0;
    int64_t least_units = 0;
    for (attention_part &part : job.parts) {
        part.few = !part.keys.packs && suits_few(job, part.keys.n_tokens);
        part.units = part.few ? few_chunks(job, part.keys) : heads;
        part.partial = floats;
        if (part.few) floats += static_cast<size_t>(few_partial_floats(job, part.keys));
        least_units += part.units;
    }
    if (job.partial->size() < floats) job.partial->resize(floats);
    int64_t units = 0;
    for (attention_part &part : job.parts) {
        if (!part.few) {
            part.range_tokens = range_tokens(job, part.keys.n_tokens, least_units, threads);
            part.ranges = (part.keys.n_tokens + part.range_tokens - 1) / part.range_tokens;
            part.units = part.ranges * heads;
        }
        part.first_unit = units;
        units += part.units;
    }
    if (job.finished_size < job.parts.size()) {
        job.finished_size = job.parts.size();
        job.finished = std::make_unique<std::atomic<int>[]>(job.finished_size);
    }
    for (size_t i = 0; i < job.parts.size(); ++i) job.finished[i].store(0, std::memory_order_relaxed);
}

int64_t saved_query_floats(const ggml_tensor *q) {
    return q->ne[0] * q->ne[1] * q->ne[2] * q->ne[3];
}

bool plan_flash_attention(const attention_pattern &found, const ggml_tensor *node, attention_job *job) {
    static_cast<attention_operands &>(*job) = found;
    job->v = node->src[2];
    const auto floats = [node](int i) { return static_cast<int64_t>(node->nb[i] / sizeof(float)); };
    job->out_head_stride = floats(1);
    job->out_token_stride = floats(2);
    job->out_stream_stride = floats(3);
    for (int i = 5; i < ggml_max_src; ++i) {
        if (node->src[i]) return false;  // an operand that this plugin does not know
    }
    return node->type == ggml_type_f32 && covered(*job);
}

bool plan_attention_chain(const attention_pattern &found, const ggml_tensor *output, attention_job *job) {
    static_cast<attention_operands &>(*job) = found;
    job->v = output->src[0];
    job->v_transposed = true;
    const auto floats = [output](int i) { return static_cast<int64_t>(output->nb[i] / sizeof(float)); };
    job->out_token_stride = floats(1);
    job->out_head_stride = floats(2);
    job->out_stream_stride = floats(3);
    return output->type == ggml_type_f32 && covered(*job);
}

void save_queries_node(ggml_tensor *, int ith, int nth, void *userdata) {
    const attention_job &job = *static_cast<attention_job *>(userdata);
    const ggml_tensor *q = job.q;
    const int64_t rows = q->ne[1] * q->ne[2] * q->ne[3];
    for (int64_t i = rows * ith / nth; i < rows * (ith + 1) / nth; ++i) {
        const int64_t token = i % q->ne[1], head = i / q->ne[1] % q->ne[2], stream = i / q->ne[1] / q->ne[2];
        std::memcpy(const_cast<float *>(query(job, token, head, stream)), row_address(q, token, head, stream),
                    static_cast<size_t>(q->ne[0]) * sizeof(float));
    }
}

void attention_node(ggml_tensor *dst, int ith, int nth, void *userdata) {
    attention_job &job = *static_cast<attention_job *>(userdata);
    float *out = static_cast<float *>(dst->data);
    packed_worker packed(job, job.memory->of(ith));
    few_worker few(job, job.memory->of(ith));
    size_t p = 0;
    for (int64_t unit; (unit = job.next.fetch_add(1, std::memory_order_relaxed)), p < job.parts.size();) {
        while (p < job.parts.size() && unit >= job.parts[p].first_unit + job.parts[p].units) ++p;
        if (p == job.parts.size()) break;
        const attention_part &part = job.parts[p];
        if (part.few) {
            packed.forget();
            few.run(part, unit - part.first_unit, nth, &job.finished[p], out);
        } else {
            few.forget();
            packed.run(part, unit - part.first_unit, out);
        }
    }
}

}  // namespace agq
