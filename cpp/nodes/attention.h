// Attention as a ggml custom node in place of the host's: for the flash node, and for the chain of
// product, soft-max and product that is built without flash attention.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/thread_memory.h"
#include "graph/attention_pattern.h"
#include "host/host.h"
#include "kernels/attention.h"
#include "nodes/custom_node.h"

namespace agq {

/// Which keys an attention looks at, if not at all. Its mask hides the other keys as well, for the host's code, which
/// knows nothing of this. One stream only.
struct key_choice {
    const int32_t *cells;  ///< ascending
    int64_t n;
    const char *mask;  ///< the chosen columns side by side, in the type of the mask
    size_t mask_stride;
};

/// The choices of the attentions of a graph, by their masks; the pruning pass makes them anew for each call.
using key_choices = std::unordered_map<const ggml_tensor *, key_choice>;

/// One attention of the graph: all tokens, heads and streams of a layer.
struct attention_job : attention_operands {
    const attention_kernel *kern = nullptr;  ///< set before planning
    bool any_length = false;                 ///< set before planning: single tokens, too
    const ggml_tensor *v = nullptr;          ///< [head, key, kv head, stream] or, transposed, [key, head, ...]
    bool v_transposed = false;
    /// Output strides in floats; the flash node is [head, query head, token, stream], the chain [head, token, query
    /// head, stream].
    int64_t out_token_stride = 0, out_head_stride = 0, out_stream_stride = 0;
    /// Where the queries wait between the nodes of the chain, in which their own memory may be used again; null: in q.
    const float *saved_q = nullptr;
    const key_choice *choice = nullptr;      ///< set before each run; null: all keys
    const thread_memory *memory = nullptr;   ///< attention_bytes(job) for each thread
    bool few = false;                        ///< whether decode_attention.h does it, which wants the next two
    float *partial = nullptr;                ///< few_partial_floats(job)
    std::vector<std::atomic<int>> finished;  ///< chunks that are done, for each stream
    std::atomic<int64_t> next{0};

    int64_t tokens() const { return q->ne[1]; }
    /// Length of a value vector.
    int64_t value_width() const { return v_transposed ? v->ne[1] : v->ne[0]; }
    int64_t n_keys() const { return choice ? choice->n : k->ne[1]; }
    int64_t cell(int64_t key) const { return choice ? choice->cells[key] : key; }
};

/// Mask of a job from a token of a stream on; null: nothing is hidden.
struct job_mask {
    const char *row = nullptr;
    size_t stride = 0;
    bool is_f16 = false;

    job_mask(const attention_job &job, int64_t token, int64_t stream);
};

/// Reads AGQ_ATTENTION (docs/paper-attention.md): null means attention of the active kernel. On a mistake returns false
/// and `*error` says which.
bool parse_attention_option(const std::string &text, const attention_kernel **kern, std::string *error);

/// Scratch memory that a job needs in each thread.
size_t attention_bytes(const attention_job &job);

/// Floats that `saved_q` takes.
int64_t saved_query_floats(const ggml_tensor *q);

/// Fills the job from a flash node, which `found` describes, or returns false if it is not covered (unknown type, odd
/// shape).
bool plan_flash_attention(const attention_pattern &found, const ggml_tensor *node, attention_job *job);

/// Fills the job from the soft-max of a chain, which `found` describes, and the product behind it, likewise.
bool plan_attention_chain(const attention_pattern &found, const ggml_tensor *output, attention_job *job);

/// One contiguous row of a tensor of any type as floats.
void read_row(const attention_kernel &kern, const ggml_tensor *t, const char *from, float *to, int64_t n);

/// One channel of `n` values from key `first` on; `row` is that of the channel, in which keys lie side by side.
void read_column(const attention_job &job, const char *row, int64_t first, int64_t n, float *column);

/// Query of (token, head) of a stream.
const float *query(const attention_job &job, int64_t token, int64_t head, int64_t stream);

/// The slope of ALiBi for each of `group` query heads from `first` on (Press et al., 2022, section 3, as ggml has it);
/// 1 without ALiBi.
void read_slopes(const attention_job &job, int64_t first, int64_t group, float *slopes);

// Functions of the custom nodes; `userdata` is the attention_job.
void save_queries_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void attention_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node save_queries{save_queries_node, false}, attend{attention_node, true};
}  // namespace node

}  // namespace agq
