#include "prune/early_tokens.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "graph/mask_view.h"
#include "graph/ubatch.h"

namespace agq {

namespace {

constexpr char mark_byte = 0x53;  // a pattern of signs that turning a row of zeros hardly gives

}  // namespace

std::vector<char> deferral_mark(const key_rows &keys) {
    const ggml_type_traits *traits = host.ggml_get_type_traits(keys.type);
    if (traits->blck_size > 1) {
        // A block begins with its scale, which is zero, and perhaps an offset. It ends with codes.
        std::vector<char> block(traits->type_size, 0);
        block.back() = mark_byte;
        return block;
    }
    std::vector<char> signs(8 * traits->type_size, 0);
    for (size_t i = 0; i < 8; ++i) {
        if (mark_byte >> i & 1) signs[(i + 1) * traits->type_size - 1] = static_cast<char>(0x80);
    }
    return signs;
}

bool is_deferred(const key_rows &keys, int64_t cell, const std::vector<char> &mark, int64_t stream) {
    return std::memcmp(keys.row(cell, stream), mark.data(), mark.size()) == 0 && keys.is_zero(cell, stream);
}

int64_t stream_of(const graph_facts &facts) {
    return cell_offset(facts.sites[0]) / root_of(facts.sites[0].cache)->ne[1];
}

std::string find_value_obstacle(const graph_facts &facts, const std::vector<std::vector<int32_t>> &cells) {
    const int64_t stream = stream_of(facts);
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        const ggml_tensor *mask = facts.kinds[k].mask, *places = facts.kinds[k].v_cells;
        for (int64_t row : {int64_t{0}, mask->ne[1] - 1}) {
            const char *values = static_cast<const char *>(mask->data) + static_cast<size_t>(row) * mask->nb[1];
            const mask_row hides(mask, row, 0);
            for (int64_t c = 0; c < mask->ne[0]; ++c) {
                const bool shows = mask->type == ggml_type_f16 ? reinterpret_cast<const uint16_t *>(values)[c] == 0
                                                               : reinterpret_cast<const float *>(values)[c] == 0;
                if (!shows && !hides.hides(c)) return "attention depends on distances";
            }
        }
        if (!places) continue;
        const int64_t *numbers = static_cast<const int64_t *>(places->data);
        const int64_t n = static_cast<int64_t>(cells[k].size()), each = places->ne[0] / n;
        const int64_t step = root_of(facts.sites[static_cast<size_t>(facts.kinds[k].site)].cache)->ne[1];
        for (int64_t j = 0; j < each; ++j) {
            if (numbers[j] != stream * step * each + cells[k][0] + j * step) {
                return "the cells of values are numbered in an unknown way";
            }
        }
    }
    return "";
}

namespace {

/// The places of tokens in one kind of attention.
class window_search {
  public:
    window_search(const graph_facts &facts, const waiting_sites &sites, const token_store &store,
                  const std::vector<const stored_token *> &tokens, size_t kind)
        : facts_(facts), sites_(sites), store_(store), tokens_(tokens), kind_(kind) {
        keys_ = key_rows::of(facts.sites[static_cast<size_t>(sites.keys[kind])].cache);
        next_ = key_rows::of(facts.sites[static_cast<size_t>(sites.next[kind])].cache);
        window_.cells.assign(tokens.size(), -1);
        window_.end_site.assign(tokens.size(), -1);
        window_.first.assign(tokens.size(), 0);
        window_.kept.resize(tokens.size());
    }

    /// Finds cells that the row sees, and others in which a token still is where it was computed.
    void find_cells(int64_t row, const std::vector<int32_t> &own, const std::vector<uint8_t> &is_missing) {
        const ggml_tensor *mask = facts_.kinds[kind_].mask;
        std::unordered_map<int32_t, size_t> place_of;  // by position
        for (size_t i = 0; i < tokens_.size(); ++i) {
            if (tokens_[i]) place_of.emplace(tokens_[i]->position, i);
        }
        const attention_site &site = facts_.sites[static_cast<size_t>(sites_.keys[kind_])];
        const int64_t n_cells = root_of(site.cache)->ne[1], offset = cell_offset(site);
        std::vector<uint8_t> is_taken(static_cast<size_t>(n_cells), 0);
        for (int32_t cell : own) is_taken[static_cast<size_t>(cell)] = 1;
        const mask_row sees(mask, row, 0);
        for (int64_t c = 0; c < mask->ne[0]; ++c) {
            if (sees.hides(c) || is_taken[static_cast<size_t>(c)]) continue;
            is_taken[static_cast<size_t>(c)] = 1;
            const stored_token *token = store_.find(kind_, token_fingerprint(keys_, c));
            const auto found = token ? place_of.find(token->position) : place_of.end();
            if (found != place_of.end()) window_.cells[found->second] = static_cast<int32_t>(c);
        }
        const std::vector<char> mark = deferral_mark(next_);
        for (size_t i = 0; i < tokens_.size(); ++i) {
            if (!tokens_[i] || window_.cells[i] >= 0) continue;
            const token_block &block = *tokens_[i]->block;
            const int64_t c = block.first_of_stream[kind_] + block.cells[kind_][tokens_[i]->index] - offset;
            if (c < 0 || c >= n_cells || is_taken[static_cast<size_t>(c)]) continue;
            const stored_token *there = store_.find(kind_, token_fingerprint(keys_, c));
            if (!there || there->block != tokens_[i]->block || there->index != tokens_[i]->index) continue;
            if (there->position != tokens_[i]->position) continue;
            // It may be the same token of another sequence, so it is only written to if it waits.
            if (is_missing[i] && !is_deferred(next_, c, mark)) continue;
            is_taken[static_cast<size_t>(c)] = 1;
            window_.cells[i] = static_cast<int32_t>(c);
        }
        // Tokens that wait may have been copied or restored to other cells.
        for (int64_t c = 0; c < n_cells; ++c) {
            if (is_taken[static_cast<size_t>(c)] || !is_deferred(next_, c, mark)) continue;
            const stored_token *there = store_.find(kind_, token_fingerprint(keys_, c));
            const auto found = there ? place_of.find(there->position) : place_of.end();
            if (found == place_of.end()) continue;
            const size_t i = found->second;
            const bool is_same = there->block == tokens_[i]->block && there->index == tokens_[i]->index;
            if (is_same && is_missing[i] && window_.cells[i] < 0) window_.cells[i] = static_cast<int32_t>(c);
        }
    }

    /// Finds the attentions that have a token. `is_gone`: whether none of them has it.
    void find_end(size_t i, bool is_gone) {
        if (is_gone) {
            window_.end_site[i] = 0;
        } else if (window_.cells[i] >= 0) {
            int32_t end = static_cast<int32_t>(facts_.sites.size());
            for (int32_t s = end - 1; s > sites_.cuts[0]; --s) {
                const attention_site &site = facts_.sites[static_cast<size_t>(s)];
                if (static_cast<size_t>(site.kind) != kind_ || !facts_.owns_cache(static_cast<size_t>(s))) continue;
                if (!key_rows::of(site.cache).is_zero(window_.cells[i], 0)) break;
                end = s;
            }
            window_.end_site[i] = end;
        } else if (tokens_[i]) {
            const std::shared_ptr<const kept_window> kept = tokens_[i]->kept(kind_);
            if (!kept) return;
            window_.kept[i] = kept;
            window_.end_site[i] = kept->end_site;
        }
    }

    /// Finds what a missing token sees. Returns whether that is known.
    bool find_first(size_t i, const std::vector<int32_t> &positions) {
        const int32_t distance = tokens_[i]->distance(kind_);
        if (distance < 0) return false;
        const auto first = std::lower_bound(positions.begin(), positions.end(), positions[i] - distance);
        window_.first[i] = static_cast<int32_t>(first - positions.begin());
        const auto end = window_.end_site.begin();
        return std::find(end + window_.first[i], end + static_cast<std::ptrdiff_t>(i), -1) ==
               end + static_cast<std::ptrdiff_t>(i);
    }

    early_window take() { return std::move(window_); }

  private:
    const graph_facts &facts_;
    const waiting_sites &sites_;
    const token_store &store_;
    const std::vector<const stored_token *> &tokens_;
    const size_t kind_;
    key_rows keys_, next_;
    early_window window_;
};

/// Whether no layer behind the first cut has a token that is missing from attention `border` on, the first of its kind.
bool is_gone_at_first_cut(const graph_facts &facts, const waiting_sites &sites, int32_t border) {
    if (border <= sites.cuts[0]) return true;
    int before = border - 1;
    const auto has_border = [&](int s) {
        const size_t site = static_cast<size_t>(s);
        return facts.sites[site].kind == sites.kind && facts.owns_cache(site);
    };
    while (before >= 0 && !has_border(before)) --before;
    const auto in_gap = [&](int cut) { return cut >= before && cut < border; };
    return sites.cuts[0] >= before && std::count_if(sites.cuts.begin(), sites.cuts.end(), in_gap) == 1;
}

/// Finds how other kinds of attention see the tokens. Takes missing ones away whose windows are not known.
void find_windows(const graph_facts &facts, int64_t row, const std::vector<std::vector<int32_t>> &own,
                  const waiting_sites &sites, const token_store &store, const std::vector<const stored_token *> &tokens,
                  const std::vector<int32_t> &border_of_cell, early_tokens *found) {
    std::vector<uint8_t> is_missing(tokens.size(), 0), waits(tokens.size(), 0);
    for (const early_token &token : found->missing) {
        is_missing[static_cast<size_t>(token.place)] = 1;
        waits[static_cast<size_t>(token.place)] = token.is_deferred;
    }
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        window_search search(facts, sites, store, tokens, k);
        search.find_cells(row, own[k], is_missing);
        for (size_t i = 0; i < tokens.size(); ++i) {
            const int32_t border = border_of_cell[static_cast<size_t>(found->cells[i])];
            search.find_end(i, waits[i] || (border >= 0 && is_gone_at_first_cut(facts, sites, border)));
        }
        const auto is_unknown = [&](const early_token &token) {
            return !search.find_first(static_cast<size_t>(token.place), found->positions);
        };
        if (static_cast<int>(k) != sites.kind) {
            found->missing.erase(std::remove_if(found->missing.begin(), found->missing.end(), is_unknown),
                                 found->missing.end());
        }
        found->windows.push_back(search.take());
    }
}

}  // namespace

early_tokens find_early_tokens(const graph_facts &facts, int64_t row, const std::vector<std::vector<int32_t>> &own,
                               const waiting_sites &sites, const hidden_cells &hidden, const token_store &store,
                               size_t row_bytes) {
    struct seen_cell {
        int32_t position, cell;
        const stored_token *token;
    };
    early_tokens found;
    found.kind = sites.kind;
    found.first_cut = sites.cuts[0];
    found.stream = stream_of(facts);
    const size_t kind = static_cast<size_t>(sites.kind);
    const mask_row mask(facts.kinds[kind].mask, row, 0);
    const int64_t n_cells = facts.kinds[kind].mask->ne[0];
    const key_rows keys = key_rows::of(facts.sites[static_cast<size_t>(sites.keys[kind])].cache),
                   next = key_rows::of(facts.sites[static_cast<size_t>(sites.next[kind])].cache);
    std::vector<uint8_t> skip(static_cast<size_t>(n_cells), 0);
    for (int32_t cell : own[kind]) skip[static_cast<size_t>(cell)] = 1;
    std::vector<seen_cell> seen;
    for (int64_t c = 0; c < n_cells; ++c) {
        if (mask.hides(c) || skip[static_cast<size_t>(c)]) continue;
        const stored_token *token = store.find(kind, token_fingerprint(keys, c));
        found.is_known = found.is_known && token;
        // What the store has forgotten is older than what it knows.
        seen.push_back({token ? token->position : -1, static_cast<int32_t>(c), token});
    }
    std::stable_sort(seen.begin(), seen.end(), [](const auto &a, const auto &b) { return a.position < b.position; });
    const std::vector<char> mark = deferral_mark(next);
    std::vector<int32_t> border_of_cell(static_cast<size_t>(n_cells), -1);
    for (const dropped_cell &d : hidden.cells(hidden.level(sites.last))) {
        border_of_cell[static_cast<size_t>(d.cell)] = d.first_layer;
    }
    std::vector<const stored_token *> tokens;
    for (const seen_cell &s : seen) {
        const int32_t place = static_cast<int32_t>(found.cells.size());
        found.cells.push_back(s.cell);
        found.positions.push_back(s.position);
        tokens.push_back(s.token);
        // Tokens that were dropped before the first cut cannot be computed.
        if (border_of_cell[static_cast<size_t>(s.cell)] <= sites.cuts[0] || !s.token || !s.token->rows()) continue;
        if (s.token->block->row_bytes != row_bytes) continue;
        found.missing.push_back({s.cell, s.position, s.token->id, place, s.token->rows(), s.token->queries(),
                                 is_deferred(next, s.cell, mark)});
    }
    if (facts.kinds.size() > 1) find_windows(facts, row, own, sites, store, tokens, border_of_cell, &found);
    return found;
}

}  // namespace agq
