// What the inputs of a graph say about the tokens that it computes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/graph_facts.h"

namespace agq {

/// How a sequence looks to attentions of one kind.
struct sequence_view {
    bool has_window = false;  ///< whether a token sees cells that the last one of its part does not
    /// Column of the sequence's first token; no_cell if a window hides it from a token of the part.
    int32_t first_cell = no_cell;

    static constexpr int32_t no_cell = -1;
};

/// Successive tokens of a ubatch that are in one sequence.
struct ubatch_part {
    int64_t first = 0, n = 0;          ///< tokens of the ubatch
    int32_t position = 0;              ///< of the first one: how many tokens of its sequence are in the cache
    bool is_alone = true;              ///< whether other parts have no tokens that it sees, and see none of its own
    bool is_wanted = false;            ///< whether the logits of all its tokens are wanted
    std::vector<sequence_view> views;  ///< by kind of attention; empty if all logits are wanted

    int64_t end() const { return first + n; }
    int64_t last() const { return first + n - 1; }
};

/// Facts about a ubatch. They are read before the graph runs, because the graph may reuse the memory of its inputs.
struct ubatch_facts {
    std::vector<std::vector<int32_t>> cells;  ///< by kind of attention: the mask's column of each token
    std::vector<int32_t> ids;        ///< the token of each place in the vocabulary; empty if the host gave embeddings
    std::vector<uint8_t> wanted;     ///< whether a token's logits are wanted
    std::vector<ubatch_part> parts;  ///< these cover all tokens
};

/// Whether each token has one position. With M-RoPE, tokens of text have the same one in the first three sections and 0
/// in the last; those of images differ. The inputs must be filled in.
bool has_text_positions(const graph_facts &facts);

/// Reads the inputs of a graph that has no obstacle. The host has filled them in. Returns empty, or the reason why no
/// token of this ubatch can be dropped; the parts may be found all the same. Throws std::bad_alloc.
std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch);

/// How many cells a token sees before its own, without a sliding window; this is its position.
int32_t find_position(const graph_facts &facts, int64_t token);

/// The mask's column of each token, in a kind of attention with one stream. Empty if one is outside the mask, or if the
/// graph stores no keys. Throws std::bad_alloc.
std::vector<int32_t> find_own_cells(const graph_facts &facts, const attention_kind &kind);

/// By how much the cell numbers in `attn_inp_k_idxs`, which count over all streams, exceed the mask's columns.
int64_t cell_offset(const attention_site &site);

}  // namespace agq
