// Whether and where a graph can be cut. All of it follows from the graph's structure and is found once per graph.
#pragma once

#include <string>
#include <vector>

#include "format/attributes.h"
#include "graph/dataflow.h"
#include "graph/graph_facts.h"
#include "kernels/attention.h"
#include "prune/kept_states.h"
#include "prune/settings.h"

namespace agq {

/// A cut after an attention.
struct prune_cut {
    prune_stage stage;
    int site = 0;                       ///< index of the attention
    int at = 0;                         ///< the last node before the cut
    int state = -1;                     ///< with a learned score: the node that it reads, the last before the cut
    std::vector<attention_head> heads;  ///< with the score `heads`: those that it looks at
    std::vector<int> crossing;          ///< numbers of token-indexed tensors that are read after the cut, except masks
    kept_states states;                 ///< if the stage reuses states
};

/// An attention whose heads are measured for this cut or a later one.
struct head_site {
    int site = 0;            ///< index of the attention
    std::vector<int> heads;  ///< ascending
};

struct prune_plan {
    int64_t tokens = 0;
    std::vector<prune_cut> cuts;    ///< in graph order
    std::vector<head_site> probes;  ///< in graph order
    std::vector<token_dim> dims;    ///< by number
    int last_states = -1;           ///< as find_last_states says
    std::string obstacle;           ///< why the graph cannot be pruned, empty if it can
};

/// How many cuts stand in front of the first attention that reads this one's cache. Tokens that leave later have keys
/// there, so all layers that share the cache see them.
size_t cuts_before_cache(const prune_plan &plan, const attention_site &site);

/// Plans cuts for `stages` (ascending layers). `kern` may be null, which is an obstacle. `dims`: what counts the
/// tokens, if that is known already, else empty. Throws std::bad_alloc.
prune_plan plan_pruning(const graph_facts &facts, const std::vector<prune_stage> &stages, const attention_kernel *kern,
                        const std::vector<token_dim> &dims);

}  // namespace agq
