// Copies of a graph's nodes that read other sources or fewer tokens. The host's tensors are never changed, because the
// host reuses them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "graph/dataflow.h"
#include "graph/graph_facts.h"
#include "host/tensor_rows.h"
#include "prune/cut_job.h"

namespace agq {

/// Owns tensors and their memory, and releases all at once. Addresses stay valid until then.
class tensor_arena {
  public:
    ggml_tensor *copy(const ggml_tensor *t) { return &(*add() = *t); }
    /// Makes a custom node without its own output.
    ggml_tensor *custom(ggml_custom_op function, void *userdata, ggml_backend_buffer *buffer);
    /// Allocates memory for tensors, aligned to 64 bytes. Throws std::bad_alloc.
    char *memory(size_t bytes);
    void clear();

  private:
    static constexpr size_t group = 64;  ///< tensors that are allocated at a time
    ggml_tensor *add();

    struct block {
        std::unique_ptr<char[]> bytes;
        size_t size = 0, used = 0;
    };
    std::vector<std::unique_ptr<ggml_tensor[]>> tensors_;  ///< in groups, which are kept for the next use
    size_t n_tensors_ = 0;
    std::vector<block> blocks_;
    float sink_[4] = {};
};

/// The graph after some changes: the replacement of each tensor, and copies of the nodes that a change affects.
class graph_copy {
  public:
    /// `dims` may be null if no tokens are dropped. The pointers must stay valid while this object is used.
    void begin(const graph_facts *facts, const std::vector<token_dim> *dims, int64_t tokens, tensor_arena *arena);
    /// Replaces a tensor for all nodes that follow.
    void replace(int number, ggml_tensor *replacement) { current_[static_cast<size_t>(number)] = replacement; }
    void restore(int number) { current_[static_cast<size_t>(number)] = nullptr; }
    ggml_tensor *current(int number) const {
        ggml_tensor *t = current_[static_cast<size_t>(number)];
        return t ? t : facts_->tensors[static_cast<size_t>(number)];
    }
    /// The node to run for `tokens_now` tokens: the original, or a copy if a source was replaced or `mask` (for its
    /// source `mask_slot`) is given. The copy writes to a part of the original's memory.
    ggml_tensor *node(int i, int64_t tokens_now, ggml_tensor *mask, int mask_slot);
    /// A copy of the node for `tokens_now` tokens that reads the replacements of its sources. Views and stores get
    /// their memory here; for other nodes `data` is null, and the caller must set it.
    ggml_tensor *aside(int i, int64_t tokens_now);
    /// A new tensor with its own memory, with room for `tokens_now` tokens instead of all.
    ggml_tensor *with_tokens(int number, int64_t tokens_now);
    /// The job that copies these rows (tokens) of `from`, the tensor's current replacement, which has `source_rows`
    /// tokens.
    cut_job::gather gather_of(int number, const ggml_tensor *from, ggml_tensor *to, int64_t source_rows,
                              const std::vector<int32_t> *rows) const;

  private:
    const graph_facts *facts_ = nullptr;
    const std::vector<token_dim> *dims_ = nullptr;
    int64_t tokens_ = 0;
    tensor_arena *arena_ = nullptr;
    std::vector<ggml_tensor *> current_;  ///< by number; null: the original
};

/// Changes a copy of a node that counts `tokens` tokens to one of `tokens_now`. Its sources must be changed already. A
/// node that counts them by stream becomes one of a single stream, with as many tokens.
void shrink(ggml_tensor *copy, const ggml_tensor *original, token_dim dim, int64_t tokens, int64_t tokens_now);

/// Bytes per token along the token dimension (all of its `mult` indices).
size_t token_bytes(const ggml_tensor *t, token_dim dim);

/// Sets the strides of a contiguous tensor from its type and extent.
void make_contiguous(ggml_tensor *t);

}  // namespace agq
