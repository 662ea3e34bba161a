#include "graph/ubatch.h"

#include <algorithm>

#include "graph/mask_view.h"

namespace agq {

int64_t cell_offset(const attention_site &site) {
    const ggml_tensor *root = root_of(site.cache);
    return (static_cast<const char *>(site.cache->data) - static_cast<const char *>(root->data)) /
           static_cast<int64_t>(site.cache->nb[1]);
}

int32_t first_position(const graph_facts &facts) {
    int64_t most = 0;
    for (const attention_kind &kind : facts.kinds) {
        most = std::max(most, mask_row(kind.mask, 0, 0).count_visible(kind.mask->ne[0]));
    }
    return static_cast<int32_t>(most) - 1;
}

std::vector<int32_t> find_own_cells(const graph_facts &facts, const attention_kind &kind) {
    std::vector<int32_t> cells;
    if (!kind.k_cells) return cells;
    const int64_t *indices = static_cast<const int64_t *>(kind.k_cells->data);
    const int64_t offset = cell_offset(facts.sites[static_cast<size_t>(kind.site)]);
    cells.reserve(static_cast<size_t>(kind.k_cells->ne[0]));
    for (int64_t t = 0; t < kind.k_cells->ne[0]; ++t) {
        const int64_t cell = indices[t] - offset;
        if (cell < 0 || cell >= kind.mask->ne[0]) return {};
        cells.push_back(static_cast<int32_t>(cell));
    }
    return cells;
}

namespace {

/// A token that sees the previous token but not the next one is in the same sequence as the previous one. In some kinds
/// of attention a window may hide the previous token. Returns empty if all tokens are in one sequence, or the reason.
std::string find_disorder(const graph_facts &facts, const ubatch_facts &ubatch, int64_t tokens) {
    for (int64_t t = 0; t + 1 < tokens; ++t) {
        bool follows = false;
        for (size_t k = 0; k < facts.kinds.size(); ++k) {
            const ggml_tensor *mask = facts.kinds[k].mask;
            const int32_t *cells = &ubatch.kinds[k].cells[static_cast<size_t>(t)];
            follows = follows || !is_hidden(mask, cells[0], t + 1, 0);
            if (follows && !is_hidden(mask, cells[1], t, 0)) return "attention is not causal";
        }
        if (!follows) return "the batch holds several sequences";
    }
    return "";
}

/// Finds windows, and the first token of the sequence.
void find_windows(const graph_facts &facts, ubatch_facts *ubatch, int64_t tokens) {
    std::vector<int64_t> seen;  // by kind: by the last token
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        const ggml_tensor *mask = facts.kinds[k].mask;
        const mask_row first(mask, 0, 0), last(mask, tokens - 1, 0);
        bool &has_window = ubatch->kinds[k].has_window;
        for (int64_t c = 0; c < mask->ne[0] && !has_window; ++c) has_window = !first.hides(c) && last.hides(c);
        seen.push_back(last.count_visible(mask->ne[0]));
    }
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        ubatch_cells &kind = ubatch->kinds[k];
        if (kind.has_window || seen[k] < *std::max_element(seen.begin(), seen.end())) continue;
        // The cache fills from its first cell, and the first cells of the sequence that are still there keep their
        // place.
        const ggml_tensor *mask = facts.kinds[k].mask;
        int64_t first = 0;
        while (first < mask->ne[0] && is_hidden(mask, first, 0, 0)) ++first;
        const bool is_later = ubatch->position > 0 && first < mask->ne[0];
        kind.first_cell = is_later ? static_cast<int32_t>(first) : kind.cells[0];
    }
}

}  // namespace

std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch) {
    const int64_t tokens = facts.n_tokens();
    const int32_t *out_ids = static_cast<const int32_t *>(facts.out_ids->data);
    if (facts.out_ids->ne[0] >= tokens) return "the logits of all tokens are requested";
    ubatch->wanted.assign(static_cast<size_t>(tokens), 0);
    for (int64_t i = 0; i < facts.out_ids->ne[0]; ++i) {
        if (out_ids[i] < 0 || out_ids[i] >= tokens) return "the graph requests logits of a token that it does not have";
        ubatch->wanted[static_cast<size_t>(out_ids[i])] = 1;
    }
    ubatch->kinds.assign(facts.kinds.size(), {});
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        ubatch->kinds[k].cells = find_own_cells(facts, facts.kinds[k]);
        if (static_cast<int64_t>(ubatch->kinds[k].cells.size()) != tokens) {
            return "the cell of a token is outside the attention mask";
        }
    }
    std::string disorder = find_disorder(facts, *ubatch, tokens);
    if (!disorder.empty()) return disorder;
    ubatch->ids.clear();
    if (facts.tokens && facts.tokens->ne[0] == tokens) {
        const int32_t *ids = static_cast<const int32_t *>(facts.tokens->data);
        ubatch->ids.assign(ids, ids + tokens);
    }
    ubatch->position = first_position(facts);
    find_windows(facts, ubatch, tokens);
    return "";
}

}  // namespace agq
