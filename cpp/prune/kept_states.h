// Keys and values of dropped tokens in later layers ("states used again"). The layers after a cut still get them,
// computed from the state in which a token was dropped, so that the remaining tokens can attend to it. Nothing is
// hidden then, now or later.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "prune/cut_job.h"
#include "prune/graph_copy.h"

namespace agq {

/// What must be computed for the tokens that one cut drops. Numbers are those of graph_facts.
struct kept_states {
    struct layer {
        int input = -1;          ///< the node of the residual stream that the layer reads
        std::vector<int> nodes;  ///< from there to the stores of keys and values, ascending
    };
    int state = -1;            ///< the node that computes the tokens' last state
    std::vector<int> leaving;  ///< the nodes from the cut to that node, ascending; empty if that node is before the cut
    std::vector<layer> layers;
    std::vector<int> gathered;  ///< tensors whose rows for these tokens are needed
};

/// The node that computes a token's state after an attention with output node `at`: the first sum after it. Returns -1
/// if attention and feed-forward part are not sequential. Throws std::bad_alloc.
int find_state(const graph_facts &facts, const std::vector<token_dim> &dims, int at);

/// Plans them for a cut after node `at`, of the attention with index `site`; `state` is the result of find_state.
/// Returns empty, or the reason why it is not possible. Throws std::bad_alloc.
std::string plan_states(const graph_facts &facts, const std::vector<token_dim> &dims, int site, int at, int state,
                        kept_states *plan);

/// Copies all these nodes for `n_gone` tokens, with their own memory. Appends the copies to `nodes` in the order to run
/// them, and adds to `job` what must be copied before. Rows come from `current` and are selected by `rows`; both must
/// outlive the run. Throws std::bad_alloc.
void copy_states(const kept_states &plan, const graph_copy &current, int64_t source_rows,
                 const std::vector<int32_t> &rows, graph_copy *aside, tensor_arena *arena, cut_job *job,
                 std::vector<ggml_tensor *> *nodes);

}  // namespace agq
