// Finds which dimension of each tensor counts the tokens of the ubatch. It walks over all nodes, with one rule per
// operation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph_facts.h"

namespace agq {

/// ne[dim] == mult * (number of tokens), token-major: token t owns the indices from t * mult to (t + 1) * mult - 1.
struct token_dim {
    int dim = -1;  ///< -1: the tensor does not depend on the number of tokens
    int64_t mult = 1;
    bool by_stream = false;  ///< the dimension counts the tokens of one stream, and dimension 3 the streams
    /// The dimension counts all tokens as many times, one section behind another: ne[dim] == sections * (number of
    /// tokens). Positions of M-RoPE are stored so.
    int64_t sections = 1;

    explicit operator bool() const { return dim >= 0; }
    bool operator==(const token_dim &other) const {
        return dim == other.dim && mult == other.mult && by_stream == other.by_stream && sections == other.sections;
    }
};

/// Traces `tokens` through the graph: `(*dims)[number]` for every tensor. If an operation or an input is not supported,
/// returns false and sets `*reason`; no tokens can be dropped then. If attention is divided into streams, each with as
/// many tokens, some tensors count them by stream.
bool trace_tokens(const graph_facts &facts, int64_t tokens, std::vector<token_dim> *dims, std::string *reason);

/// The same for the `outputs` tokens whose logits are wanted: through the nodes behind their selection. Throws
/// std::bad_alloc.
bool trace_outputs(const graph_facts &facts, int64_t outputs, std::vector<token_dim> *dims, std::string *reason);

/// Whether a node only shows its source's memory and computes nothing.
bool is_view_op(const ggml_tensor *node);

}  // namespace agq
