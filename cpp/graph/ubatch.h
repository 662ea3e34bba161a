// What the inputs of a graph say about the tokens that it computes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph_facts.h"

namespace agq {

/// Facts about a ubatch. They are read before the graph runs, because the graph may reuse the memory of its inputs.
struct ubatch_facts {
    std::vector<int32_t> cells;   ///< the mask's column of each token
    std::vector<int32_t> ids;     ///< the token of each place in the vocabulary; empty if the host gave embeddings
    std::vector<uint8_t> wanted;  ///< whether a token's logits are wanted
    int32_t position = 0;         ///< of the first token: how many tokens of its sequence are in the cache
    int32_t first_cell = 0;       ///< column of the sequence's first token
};

/// Reads the inputs of a graph that has no obstacle. The host has filled them in. Returns empty, or the reason why this
/// ubatch cannot be pruned. Throws std::bad_alloc.
std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch);

/// How many cells the first token sees before its own; this is its position.
int32_t first_position(const graph_facts &facts);

/// By how much the cell numbers in `attn_inp_k_idxs`, which count over all streams, exceed the mask's columns.
int64_t cell_offset(const attention_site &site);

}  // namespace agq
