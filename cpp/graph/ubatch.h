// What the inputs of a graph say about the tokens that it computes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph_facts.h"

namespace agq {

/// Where the tokens of a ubatch are for attentions of one kind.
struct ubatch_cells {
    std::vector<int32_t> cells;  ///< the mask's column of each token
    bool has_window = false;     ///< whether a token sees cells that the last one does not
    /// Column of the sequence's first token; no_cell if a window hides it from a token of the ubatch.
    int32_t first_cell = no_cell;

    static constexpr int32_t no_cell = -1;
};

/// Facts about a ubatch. They are read before the graph runs, because the graph may reuse the memory of its inputs.
struct ubatch_facts {
    std::vector<ubatch_cells> kinds;  ///< by kind of attention
    std::vector<int32_t> ids;         ///< the token of each place in the vocabulary; empty if the host gave embeddings
    std::vector<uint8_t> wanted;      ///< whether a token's logits are wanted
    int32_t position = 0;             ///< of the first token: how many tokens of its sequence are in the cache
};

/// Reads the inputs of a graph that has no obstacle. The host has filled them in. Returns empty, or the reason why this
/// ubatch cannot be pruned. Throws std::bad_alloc.
std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch);

/// How many cells the first token sees before its own, without a sliding window; this is its position.
int32_t first_position(const graph_facts &facts);

/// The mask's column of each token, in a kind of attention with one stream. Empty if one is outside the mask, or if the
/// graph stores no keys. Throws std::bad_alloc.
std::vector<int32_t> find_own_cells(const graph_facts &facts, const attention_kind &kind);

/// By how much the cell numbers in `attn_inp_k_idxs`, which count over all streams, exceed the mask's columns.
int64_t cell_offset(const attention_site &site);

}  // namespace agq
