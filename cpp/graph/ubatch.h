// What the inputs of a graph say of the tokens that it computes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph_facts.h"

namespace agq {

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

/// By how much the numbers in `attn_inp_k_idxs`, which count the cells of all streams, exceed those of the mask.
int64_t cell_offset(const attention_site &site);

}  // namespace agq
