#include "graph/ubatch.h"

#include <algorithm>

#include "base/prefetch.h"
#include "graph/mask_view.h"

namespace agq {

int64_t cell_offset(const attention_site &site) {
    const ggml_tensor *root = root_of(site.cache);
    return (static_cast<const char *>(site.cache->data) - static_cast<const char *>(root->data)) /
           static_cast<int64_t>(site.cache->nb[1]);
}

int32_t find_position(const graph_facts &facts, int64_t token) {
    int64_t most = 0;
    for (const attention_kind &kind : facts.kinds) {
        most = std::max(most, mask_row(kind.mask, token, 0).count_visible(kind.mask->ne[0]));
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

bool has_text_positions(const graph_facts &facts) {
    const int64_t n = facts.n_tokens();
    if (!facts.positions || facts.positions->ne[0] == n) return true;
    if (facts.positions->ne[0] != position_sections * n) return false;
    const int32_t *first = static_cast<const int32_t *>(facts.positions->data);
    const auto is_zero = [](int32_t position) { return position == 0; };
    return std::equal(first, first + n, first + n) && std::equal(first, first + n, first + 2 * n) &&
           std::all_of(first + 3 * n, first + 4 * n, is_zero);
}

namespace {

/// Whether a token sees another one of the ubatch in some kind of attention. In other kinds a window may hide it.
bool sees(const graph_facts &facts, const ubatch_facts &ubatch, int64_t token, int64_t other) {
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        if (!is_hidden(facts.kinds[k].mask, ubatch.cells[k][static_cast<size_t>(other)], token, 0)) return true;
    }
    return false;
}

/// Finds the parts. A token that sees the previous token but not the next one is in the sequence of the previous one.
/// Returns the reason if tokens do not only look back, else empty.
std::string find_parts(const graph_facts &facts, ubatch_facts *ubatch, int64_t tokens) {
    ubatch->parts.clear();
    bool sees_itself = true, sees_next = false;
    std::vector<uint8_t> sees_previous(static_cast<size_t>(tokens), 0);
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        const mask_row first(facts.kinds[k].mask, 0, 0);
        const size_t stride = facts.kinds[k].mask->nb[1];
        const int32_t *cells = ubatch->cells[k].data();
        for (int64_t t = 0; t < tokens; ++t) {
            const mask_row row = first.after(static_cast<size_t>(t) * stride);
            const int64_t ahead = std::min(t + mask_rows_ahead, tokens - 1);
            prefetch(first.after(static_cast<size_t>(ahead) * stride).at(cells[ahead]));
            sees_itself &= !row.hides(cells[t]);
            if (t > 0) sees_previous[static_cast<size_t>(t)] |= static_cast<uint8_t>(!row.hides(cells[t - 1]));
            if (t + 1 < tokens) sees_next |= !row.hides(cells[t + 1]);
        }
    }
    for (int64_t t = 0; t < tokens; ++t) {
        if (!sees_previous[static_cast<size_t>(t)]) ubatch->parts.emplace_back().first = t;
        ++ubatch->parts.back().n;
    }
    return sees_next ? "attention is not causal" : sees_itself ? "" : "a token does not see itself";
}

/// Finds parts whose tokens are in a sequence of which other parts have tokens, too.
void find_company(const graph_facts &facts, ubatch_facts *ubatch) {
    for (ubatch_part &part : ubatch->parts) {
        for (ubatch_part &other : ubatch->parts) {
            if (&other == &part || (!part.is_alone && !other.is_alone)) continue;
            for (int64_t t = other.first; t < other.end(); ++t) {
                if (sees(facts, *ubatch, part.first, t) || sees(facts, *ubatch, part.last(), t)) {
                    part.is_alone = other.is_alone = false;
                    break;
                }
            }
        }
    }
}

/// Finds windows, and the first token of the sequence.
void find_windows(const graph_facts &facts, const ubatch_facts &ubatch, ubatch_part *part) {
    std::vector<int64_t> seen;  // by kind: by the last token
    part->views.assign(facts.kinds.size(), {});
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        const ggml_tensor *mask = facts.kinds[k].mask;
        const mask_row first(mask, part->first, 0), last(mask, part->last(), 0);
        bool &has_window = part->views[k].has_window;
        for (int64_t c = 0; c < mask->ne[0] && !has_window; ++c) has_window = !first.hides(c) && last.hides(c);
        seen.push_back(last.count_visible(mask->ne[0]));
    }
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        sequence_view &view = part->views[k];
        if (view.has_window || seen[k] < *std::max_element(seen.begin(), seen.end())) continue;
        // The cache fills from its first cell, and the first cells of the sequence that are still there keep their
        // place.
        const ggml_tensor *mask = facts.kinds[k].mask;
        int64_t first = 0;
        while (first < mask->ne[0] && is_hidden(mask, first, part->first, 0)) ++first;
        const bool is_later = part->position > 0 && first < mask->ne[0];
        view.first_cell = is_later ? static_cast<int32_t>(first) : ubatch.cells[k][static_cast<size_t>(part->first)];
    }
}

}  // namespace

std::string read_ubatch(const graph_facts &facts, ubatch_facts *ubatch) {
    const int64_t tokens = facts.n_tokens();
    const int32_t *out_ids = static_cast<const int32_t *>(facts.out_ids->data);
    ubatch->wanted.assign(static_cast<size_t>(tokens), 0);
    for (int64_t i = 0; i < facts.out_ids->ne[0]; ++i) {
        if (out_ids[i] < 0 || out_ids[i] >= tokens) return "the graph requests logits of a token that it does not have";
        ubatch->wanted[static_cast<size_t>(out_ids[i])] = 1;
    }
    ubatch->cells.clear();
    ubatch->parts.clear();
    for (const attention_kind &kind : facts.kinds) {
        ubatch->cells.push_back(find_own_cells(facts, kind));
        if (static_cast<int64_t>(ubatch->cells.back().size()) != tokens) {
            return "the cell of a token is outside the attention mask";
        }
    }
    std::string disorder = find_parts(facts, ubatch, tokens);
    if (!disorder.empty()) ubatch->parts.clear();
    if (facts.out_ids->ne[0] >= tokens) return "the logits of all tokens are requested";
    if (!disorder.empty()) return disorder;
    if (!has_text_positions(facts)) return "the ubatch holds tokens of an image (positions of M-RoPE that differ)";
    find_company(facts, ubatch);
    ubatch->ids.clear();
    if (facts.tokens && facts.tokens->ne[0] == tokens) {
        const int32_t *ids = static_cast<const int32_t *>(facts.tokens->data);
        ubatch->ids.assign(ids, ids + tokens);
    }
    for (ubatch_part &part : ubatch->parts) {
        const auto begin = ubatch->wanted.begin() + part.first;
        part.is_wanted = std::all_of(begin, begin + part.n, [](uint8_t is) { return is != 0; });
        part.position = find_position(facts, part.first);
        if (!part.is_wanted) find_windows(facts, *ubatch, &part);
    }
    return "";
}

}  // namespace agq
