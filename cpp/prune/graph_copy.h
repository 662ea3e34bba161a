// Copies of a graph's nodes that read other sources or fewer tokens. The host's tensors are never changed, because it
// uses them again.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "graph/dataflow.h"
#include "graph/graph_facts.h"
#include "host/tensor_rows.h"
#include "prune/cut_job.h"

namespace agq {

/// Tensors and their memory, all released at once. Addresses stay valid until then.
class tensor_arena {
  public:
    ggml_tensor *copy(const ggml_tensor *t) { return &tensors_.emplace_back(*t); }
    /// A custom node without an output of its own.
    ggml_tensor *custom(ggml_custom_op function, void *userdata, ggml_backend_buffer *buffer);
    /// Memory for tensors, aligned to 64 bytes. Throws std::bad_alloc.
    char *memory(size_t bytes);
    void clear();

  private:
    struct block {
        std::unique_ptr<char[]> bytes;
        size_t size = 0, used = 0;
    };
    std::deque<ggml_tensor> tensors_;
    std::vector<block> blocks_;
    float sink_[4] = {};
};

/// The graph as it looks behind some changes: what replaces each tensor, and copies of the nodes that see a change.
class graph_copy {
  public:
    /// `dims` may be null if no tokens are dropped. All pointers must outlive this object's use.
    void begin(const graph_facts *facts, const std::vector<token_dim> *dims, int64_t tokens, tensor_arena *arena);
    /// From here on `replacement` stands for the tensor.
    void replace(int number, ggml_tensor *replacement) { current_[static_cast<size_t>(number)] = replacement; }
    void restore(int number) { current_[static_cast<size_t>(number)] = nullptr; }
    ggml_tensor *current(int number) const {
        ggml_tensor *t = current_[static_cast<size_t>(number)];
        return t ? t : facts_->tensors[static_cast<size_t>(number)];
    }
    /// The node as it is to be run for `tokens_now` tokens: itself, or a copy if a source was replaced or `mask` (its
    /// source `mask_slot`) is given. The copy writes to the memory of the original, of which it needs a part.
    ggml_tensor *node(int i, int64_t tokens_now, ggml_tensor *mask, int mask_slot);
    /// A copy of the node for `tokens_now` tokens that reads what stands for its sources. Views and stores know their
    /// memory; of others `data` is null, for the caller to give them some.
    ggml_tensor *aside(int i, int64_t tokens_now);
    /// A tensor in memory of its own that has room for `tokens_now` tokens in place of all.
    ggml_tensor *with_tokens(int number, int64_t tokens_now);
    /// What copies these rows (of tokens) of `from`, which stands for the tensor and has `source_rows` tokens.
    cut_job::gather gather_of(int number, const ggml_tensor *from, ggml_tensor *to, int64_t source_rows,
                              const std::vector<int32_t> *rows) const;

  private:
    void shrink(ggml_tensor *copy, const ggml_tensor *original, token_dim dim, int64_t tokens_now) const;

    const graph_facts *facts_ = nullptr;
    const std::vector<token_dim> *dims_ = nullptr;
    int64_t tokens_ = 0;
    tensor_arena *arena_ = nullptr;
    std::vector<ggml_tensor *> current_;  ///< by number; null: the original
};

/// Bytes of one step of the token dimension, for all of its `mult` indices.
size_t token_bytes(const ggml_tensor *t, token_dim dim);

/// Sets the strides of a contiguous tensor of this type and extent.
void make_contiguous(ggml_tensor *t);

}  // namespace agq
