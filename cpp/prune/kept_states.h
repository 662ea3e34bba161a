// Keys and values of tokens that have left ("states used again"): the layers behind a cut still get them, made from the
// state in which a token left, so that what stays can look at it. Nothing is hidden then, now or later.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "prune/cut_job.h"
#include "prune/graph_copy.h"

namespace agq {

/// What has to be computed for the tokens that leave at one cut. Numbers are those of graph_facts.
struct kept_states {
    struct layer {
        int input = -1;          ///< the node of the residual stream that the layer reads
        std::vector<int> nodes;  ///< from there to the stores of keys and values, ascending
    };
    int state = -1;            ///< the node that makes the state in which they leave
    std::vector<int> leaving;  ///< the nodes from the cut to there, ascending; none if the cut is behind it
    std::vector<layer> layers;
    std::vector<int> gathered;  ///< tensors of which the rows of these tokens are needed
};

/// The node that makes the state of a token behind an attention whose output is node `at`: the first sum there. Returns
/// -1 if the attention and the feed-forward part do not stand one behind the other. Throws std::bad_alloc.
int find_state(const graph_facts &facts, const std::vector<token_dim> &dims, int at);

/// Finds them for a cut behind node `at`, of the attention with index `site`; `state` is what find_state found. Returns
/// why it cannot be done, empty if it can. Throws std::bad_alloc.
std::string plan_states(const graph_facts &facts, const std::vector<token_dim> &dims, int site, int at, int state,
                        kept_states *plan);

/// Copies of all these nodes for `n_gone` tokens in memory of their own, to be run in this order. Rows come from
/// `current` and are chosen by `rows`, which both must outlive the run. Adds to `nodes`, and to `job` what has to be
/// copied before. Throws std::bad_alloc.
void copy_states(const kept_states &plan, const graph_copy &current, int64_t source_rows,
                 const std::vector<int32_t> &rows, graph_copy *aside, tensor_arena *arena, cut_job *job,
                 std::vector<ggml_tensor *> *nodes);

}  // namespace agq
