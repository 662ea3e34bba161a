#include "graph/ubatch.h"

#include "graph/mask_view.h"

namespace agq {

int64_t cell_offset(const attention_site &site) {
    const ggml_tensor *root = root_of(site.cache);
    return (static_cast<const char *>(site.cache->data) - static_cast<const char *>(root->data)) /
           static_cast<int64_t>(site.cache->nb[1]);
}

int32_t first_position(const graph_facts &facts) {
    return static_cast<int32_t>(mask_row(facts.mask, 0, 0).count_visible(facts.mask->ne[0])) - 1;
}

std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch) {
    const int64_t tokens = facts.k_cells->ne[0], columns = facts.mask->ne[0], offset = cell_offset(facts.sites[0]);
    const int64_t *indices = static_cast<const int64_t *>(facts.k_cells->data);
    const int32_t *out_ids = static_cast<const int32_t *>(facts.out_ids->data);
    if (facts.out_ids->ne[0] >= tokens) return "the logits of all tokens are requested";
    ubatch->wanted.assign(static_cast<size_t>(tokens), 0);
    for (int64_t i = 0; i < facts.out_ids->ne[0]; ++i) {
        if (out_ids[i] < 0 || out_ids[i] >= tokens) return "the graph requests logits of a token that it does not have";
        ubatch->wanted[static_cast<size_t>(out_ids[i])] = 1;
    }
    std::vector<int32_t> &cells = ubatch->cells;
    cells.resize(static_cast<size_t>(tokens));
    for (size_t t = 0; t < cells.size(); ++t) {
        const int64_t cell = indices[t] - offset;
        if (cell < 0 || cell >= columns) return "the cell of a token is outside the attention mask";
        cells[t] = static_cast<int32_t>(cell);
    }
    // A token that sees the previous token but not the next one is in the same sequence as the previous one.
    for (int64_t t = 0; t + 1 < tokens; ++t) {
        const size_t i = static_cast<size_t>(t);
        if (is_hidden(facts.mask, cells[i], t + 1, 0)) return "the batch holds several sequences";
        if (!is_hidden(facts.mask, cells[i + 1], t, 0)) return "attention is not causal";
    }
    ubatch->ids.clear();
    if (facts.tokens && facts.tokens->ne[0] == tokens) {
        const int32_t *ids = static_cast<const int32_t *>(facts.tokens->data);
        ubatch->ids.assign(ids, ids + tokens);
    }
    ubatch->position = first_position(facts);
    // The cache fills from its first cell, and the first cells of the sequence that are still there keep their place.
    int64_t first = 0;
    while (first < columns && is_hidden(facts.mask, first, 0, 0)) ++first;
    ubatch->first_cell = ubatch->position > 0 && first < columns ? static_cast<int32_t>(first) : cells[0];
    return "";
}

}  // namespace agq
