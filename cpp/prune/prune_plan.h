// Whether and where a graph can be cut: all that follows from its structure, found once for each graph.
#pragma once

#include <string>
#include <vector>

#include "../kernels/attention.h"
#include "dataflow.h"
#include "graph_facts.h"
#include "kept_states.h"
#include "settings.h"

namespace agq {

/// A cut behind an attention.
struct prune_cut {
    prune_stage stage;
    int site = 0;               ///< index of the attention
    int at = 0;                 ///< the last node before the cut
    int state = -1;             ///< of a learned score: the node of which it is a function, the last before the cut
    std::vector<int> crossing;  ///< numbers of token-indexed tensors that are read behind it, but for the mask
    kept_states states;         ///< if the stage wants them
};

struct prune_plan {
    int64_t tokens = 0;
    std::vector<prune_cut> cuts;  ///< in graph order
    std::vector<token_dim> dims;  ///< by number
    std::string obstacle;         ///< why the graph cannot be pruned, empty if it can
};

/// Plans cuts for `stages` (ascending layers). `kern` may be null, which is an obstacle. Throws std::bad_alloc.
prune_plan plan_pruning(const graph_facts &facts, const std::vector<prune_stage> &stages, const attention_kernel *kern);

/// What the inputs say of an ubatch. They are read before the graph runs, which may use their memory again.
struct ubatch_facts {
    std::vector<int32_t> cells;   ///< the mask's column of each token
    std::vector<uint8_t> wanted;  ///< whether the logits of a token are asked for
    int32_t position = 0;         ///< of the first token: how many of its sequence are in the cache
    int32_t first_cell = 0;       ///< column of the sequence's first token
};

/// Reads the inputs that the host has filled in for a graph without an obstacle. Returns why this ubatch cannot be
/// pruned, empty if it can. Throws std::bad_alloc.
std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch);

/// How many cells the first token sees before itself, which is its position.
int32_t first_position(const graph_facts &facts);

}  // namespace agq
