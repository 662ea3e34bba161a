// Finds the work of the host around products with experts that nodes of ours can do. What is found has the host's
// results to the bit.
#pragma once

#include <vector>

#include "nodes/expert_choice.h"
#include "nodes/expert_sum.h"

namespace agq {

/// Nodes that weigh and add the outputs of a token's experts.
struct expert_sum_match : expert_sum_tensors {
    std::vector<int> replaced;  ///< indices of nodes, ascending; the last one has the result
};

/// Finds MUL of all outputs by the weights, perhaps with ADD_ID of a bias before it, and the ADDs of the results.
std::vector<expert_sum_match> find_expert_sums(ggml_tensor **nodes, int n);

/// Nodes that choose experts and get their weights.
struct expert_choice_match : expert_choice_tensors {
    std::vector<int> replaced;  ///< indices of nodes, ascending
};

/// Finds ARGSORT of scores, GET_ROWS of the first ones' values, and perhaps SUM_ROWS, CLAMP and DIV by the sum.
std::vector<expert_choice_match> find_expert_choices(ggml_tensor **nodes, int n);

}  // namespace agq
