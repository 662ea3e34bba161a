// Which dimension of which tensor counts the tokens of the ubatch: a walk over all nodes with one rule for each
// operation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph_facts.h"

namespace agq {

/// ne[dim] == mult * (number of tokens), token-major: token t owns indices t * mult to (t + 1) * mult - 1.
struct token_dim {
    int dim = -1;  ///< -1: the tensor does not depend on the number of tokens
    int64_t mult = 1;

    explicit operator bool() const { return dim >= 0; }
    bool operator==(const token_dim &other) const { return dim == other.dim && mult == other.mult; }
};

/// Traces `tokens` through the graph: `(*dims)[number]` for every tensor. Returns false and says why in `*reason` if
/// the graph holds an operation or an input that is not understood; nothing can be dropped then.
bool trace_tokens(const graph_facts &facts, int64_t tokens, std::vector<token_dim> *dims, std::string *reason);

/// Whether a node shows memory of its source without computing anything.
bool is_view_op(const ggml_tensor *node);

}  // namespace agq
