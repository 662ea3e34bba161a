// Attention as a ggml custom node that replaces the host's. It replaces the flash node, or, without flash attention,
// the chain of product, soft-max and product.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/thread_memory.h"
#include "graph/attention_pattern.h"
#include "host/host.h"
#include "kernels/attention.h"
#include "nodes/custom_node.h"

namespace agq {

/// Successive tokens of a stream, and the cells that any of them sees: usually those of one sequence. A group is
/// computed by itself, so its results do not depend on what else is in the batch or in the cache.
struct key_group {
    int64_t stream = 0, first_token = 0, n_tokens = 0;
    const int32_t *cells = nullptr;  ///< ascending cell numbers; null: n successive ones
    int64_t first_cell = 0;          ///< the first of these
    int64_t n = 0;
    const char *mask = nullptr;  ///< of the first token: the columns of these cells, side by side, in the mask's type
    size_t mask_stride = 0;
    /// Whether the keys are packed even for few tokens, whose results are then the same as beside more tokens.
    bool packs = false;

    int64_t cell(int64_t key) const { return cells ? cells[key] : first_cell + key; }
    static constexpr int32_t no_column = -1;
    /// The place of a cell among the keys, or no_column. `next`: where it probably is.
    int32_t column_of(int32_t cell, int64_t next = 0) const;
};

/// All tokens of a graph, in groups; by the mask of its attentions. New ones are made for each call. A mask that is
/// missing here has one group for each stream, which sees all cells.
using key_choices = std::unordered_map<const ggml_tensor *, std::vector<key_group>>;

/// The work of one group in one call.
struct attention_part {
    key_group keys;
    int64_t first_unit = 0, units = 0;
    bool few = false;                      ///< whether decode_attention.h runs it
    size_t partial = 0;                    ///< if so: where its results begin in attention_job::partial
    int64_t ranges = 1, range_tokens = 0;  ///< else: ranges of so many tokens, each with all heads
};

/// One attention of the graph: all tokens, heads and streams of a layer.
struct attention_job : attention_operands {
    const attention_kernel *kern = nullptr;  ///< set before planning
    bool any_length = false;                 ///< set before planning: also single tokens
    const ggml_tensor *v = nullptr;          ///< [head, key, kv head, stream] or, transposed, [key, head, ...]
    bool v_transposed = false;
    /// Output strides in floats. The flash node's output is [head, query head, token, stream], the chain's [head,
    /// token, query head, stream].
    int64_t out_token_stride = 0, out_head_stride = 0, out_stream_stride = 0;
    /// Copy of the queries, made because the chain's later nodes may reuse their memory. Null: read from q.
    const float *saved_q = nullptr;
    const thread_memory *memory = nullptr;  ///< attention_bytes(job) for each thread
    // Of a call, by begin_attention.
    std::vector<attention_part> parts;
    std::vector<float> *partial = nullptr;         ///< results of chunks; jobs run one after another and share it
    std::unique_ptr<std::atomic<int>[]> finished;  ///< number of finished chunks, by part
    size_t finished_size = 0;
    std::atomic<int64_t> next{0};

    int64_t tokens() const { return q->ne[1]; }
    int64_t group() const { return q->ne[2] / k->ne[2]; }  ///< query heads that share a key/value head
    /// Length of a value vector.
    int64_t value_width() const { return v_transposed ? v->ne[1] : v->ne[0]; }
    bool mask_is_f16() const;
};

/// Reads AGQ_ATTENTION (docs/paper-attention.md). Null stands for the active kernel's attention. On an error returns
/// false and sets `*error` to a message.
bool parse_attention_option(const std::string &text, const attention_kernel **kern, std::string *error);

/// Scratch memory in bytes that a job needs in each thread, if no group `packs`.
size_t attention_bytes(const attention_job &job);

/// The same if all groups do.
size_t packed_attention_bytes(const attention_job &job);

/// Prepares a call. `groups` covers all tokens; null: one group for each stream, which sees all cells. Throws
/// std::bad_alloc.
void begin_attention(attention_job *planned, const std::vector<key_group> *groups, int threads);

/// Size of `saved_q` in floats.
int64_t saved_query_floats(const ggml_tensor *q);

/// Fills the job from a flash node, which `found` describes. Returns false if the node is not supported (unknown type,
/// unusual shape).
bool plan_flash_attention(const attention_pattern &found, const ggml_tensor *node, attention_job *job);

/// The same for a chain: `found` describes its soft-max, and `output` is the product that follows.
bool plan_attention_chain(const attention_pattern &found, const ggml_tensor *output, attention_job *job);

/// Converts one contiguous row of a tensor of any type to floats.
void read_row(const attention_kernel &kern, const ggml_tensor *t, const char *from, float *to, int64_t n);

/// Reads one channel of `n` values, starting at key `first`. `row` is the channel's row in a transposed cache.
void read_column(const attention_job &job, const key_group &keys, const char *row, int64_t first, int64_t n,
                 float *column);

/// The query of (token, head) of a stream.
const float *query(const attention_job &job, int64_t token, int64_t head, int64_t stream);

/// The ALiBi slopes of `group` query heads, starting at head `first` (Press et al., 2022, section 3, as in ggml); 1
/// without ALiBi.
void read_slopes(const attention_job &job, int64_t first, int64_t group, float *slopes);

// Functions of the custom nodes; `userdata` is the attention_job.
void save_queries_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void attention_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node save_queries{save_queries_node, false}, attend{attention_node, true};
}  // namespace node

}  // namespace agq
