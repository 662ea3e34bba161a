// The part of waiting_tokens that reads a graph: which attentions matter, and what its tokens are.
#include <algorithm>

#include "graph/mask_view.h"
#include "graph/token_cut.h"
#include "prune/waiting_tokens.h"

namespace agq {

namespace {

/// How many cells the tokens of a graph see in a kind of attention.
int64_t count_seen(const ggml_tensor *mask) {
    int64_t seen = 0;
    for (int64_t stream = 0; stream < mask->ne[3]; ++stream) {
        for (int64_t t = 0; t < mask->ne[1]; ++t) seen += mask_row(mask, t, stream).count_visible(mask->ne[0]);
    }
    return seen;
}

/// Whether the keys that are stored in a cache depend on positions.
bool has_turned_keys(const graph_facts &facts, const ggml_tensor *cache) {
    for (int i = 0; i < facts.n_nodes; ++i) {
        const ggml_tensor *t = facts.tensors[static_cast<size_t>(i)];
        if (t->op != host.op_set_rows || root_of(t) != cache) continue;
        for (t = t->src[0]; t && t->op != host.op_mul_mat; t = t->src[0]) {
            if (t->op == host.op_rope) return true;
        }
    }
    return false;
}

}  // namespace

/// Whether this context prunes by heads, and so that tokens can wait for their question.
bool waiting_tokens::asks() {
    if (asks_ == answer::unknown && facts().complete && !facts().sites.empty()) {
        asks_ = planned_->asks() ? answer::yes : answer::no;
        for (const prune_stage &stage : planned_->stages()) layers_.push_back(stage.layer);
    }
    return asks_ == answer::yes;
}

/// A kind of attention whose tokens see all tokens in front of them. As long as no window has hidden any, it may be one
/// with a window.
int waiting_tokens::find_kind() {
    const std::vector<attention_kind> &kinds = facts().kinds;
    if (kinds.size() < 2) return 0;
    if (known_kind_ >= 0 && known_kind_ < static_cast<int>(kinds.size())) return known_kind_;
    int most = 0;
    std::vector<int64_t> seen;
    for (size_t k = 0; k < kinds.size(); ++k) {
        seen.push_back(count_seen(kinds[k].mask));
        if (seen[k] > seen[static_cast<size_t>(most)]) most = static_cast<int>(k);
    }
    if (std::count(seen.begin(), seen.end(), seen[static_cast<size_t>(most)]) == 1) known_kind_ = most;
    return most;
}

/// Finds the attentions that matter. Returns the reason if tokens cannot wait, empty if they can.
std::string waiting_tokens::find_sites() {
    const graph_facts &f = facts();
    sites_ = {};
    sites_.kind = find_kind();
    sites_.is_sure = f.kinds.size() == 1 || known_kind_ >= 0;
    for (int layer : layers_) {
        int site = 0;
        if (!find_site(f, layer, &site).empty()) return "a pruning layer was not found";
        sites_.cuts.push_back(site);
    }
    sites_.keys.assign(f.kinds.size(), -1);
    sites_.next.assign(f.kinds.size(), -1);
    for (int s = 0; s < static_cast<int>(f.sites.size()); ++s) {
        const attention_site &site = f.sites[static_cast<size_t>(s)];
        const size_t kind = static_cast<size_t>(site.kind);
        if (!f.owns_cache(static_cast<size_t>(s))) {
            // What tokens that wait see there must be computed for them, too, or in the cache of the host.
            const auto is_between = [&](int cut) { return site.owner <= cut && cut < s; };
            const auto cut = std::find_if(sites_.cuts.begin(), sites_.cuts.end(), is_between);
            if (cut != sites_.cuts.end() && (cut == sites_.cuts.begin() || s <= sites_.cuts.back())) {
                return "a layer behind a pruning layer reads the K/V cache of one in front of it";
            }
            continue;
        }
        if (s <= sites_.cuts[0]) sites_.keys[kind] = s;
        if (s > sites_.cuts[0] && sites_.next[kind] < 0) sites_.next[kind] = s;
        if (site.kind == sites_.kind) sites_.last = s;
        if (site.max_bias != 0) return "attention depends on distances";
    }
    for (size_t k = 0; k < f.kinds.size(); ++k) {
        // Keys of the first layer do not depend on the tokens in front.
        if (sites_.keys[k] >= 1 && sites_.next[k] >= 0) continue;
        return f.kinds.size() == 1
                   ? "the first pruning layer must not be layer 0, and a layer with its own K/V cache must follow it"
                   : "layers with and without a sliding window, and with a K/V cache of their own, must both "
                     "come after layer 0 up to the first pruning layer, and both behind it";
    }
    return "";
}

bool waiting_tokens::may_begin_to_wait() {
    const graph_facts &f = facts();
    if (!f.out_ids || f.out_ids->ne[0] >= f.n_tokens() || !f.positions || !asks()) return false;
    if (!has_text_positions(f)) return false;
    const int32_t *positions = static_cast<const int32_t *>(f.positions->data);
    const int32_t *out_ids = static_cast<const int32_t *>(f.out_ids->data);
    for (int64_t t = 0; t < f.n_tokens(); ++t) {
        if (positions[t] > 0 && std::find(out_ids, out_ids + f.out_ids->ne[0], t) == out_ids + f.out_ids->ne[0]) {
            return true;
        }
    }
    return false;
}

bool waiting_tokens::read_own(const std::vector<std::vector<int32_t>> &own_cells) {
    const graph_facts &f = facts();
    const int64_t n = f.n_tokens();
    obstacle_ = "this kind of ubatch cannot wait for it";
    has_computed_ = false;
    if (n == 0 || !asks() || !f.complete || !f.positions || !has_text_positions(f)) return false;
    for (size_t k = 0; k < f.kinds.size(); ++k) {
        const attention_kind &kind = f.kinds[k];
        if (!kind.k_cells || kind.k_cells->ne[0] != n || kind.mask->ne[1] * kind.mask->ne[3] != n) return false;
        if (kind.mask->ne[3] == 1 && own_cells[k].size() != static_cast<size_t>(n)) return false;
    }
    const std::string reason = find_sites();
    if (!reason.empty()) {
        obstacle_ = reason;
        return false;
    }
    keys_.clear();
    next_keys_.clear();
    roots_.clear();
    turns_.clear();
    n_cells_.clear();
    first_of_stream_.clear();
    cells_.clear();
    for (size_t k = 0; k < f.kinds.size(); ++k) {
        const attention_site &site = f.sites[static_cast<size_t>(sites_.keys[k])];
        const attention_site &next = f.sites[static_cast<size_t>(sites_.next[k])];
        keys_.push_back(key_rows::of(site.cache));
        next_keys_.push_back(key_rows::of(next.cache));
        const ggml_tensor *cache = root_of(site.cache);
        roots_.push_back(cache->data);
        turns_.push_back(f.kinds.size() == 1 || has_turned_keys(f, cache));
        n_cells_.push_back(cache->ne[1] * cache->ne[2]);
        if (f.mask->ne[3] == 1) {
            // The cells of one stream may begin in the middle of the cache.
            first_of_stream_.push_back(cell_offset(site));
            cells_.push_back(own_cells[k]);
            continue;
        }
        first_of_stream_.push_back(0);
        keys_[k].base = static_cast<const char *>(cache->data);
        next_keys_[k].base = static_cast<const char *>(root_of(next.cache)->data);
        const int64_t *indices = static_cast<const int64_t *>(f.kinds[k].k_cells->data);
        const int64_t n_cells = n_cells_[k];
        if (std::any_of(indices, indices + n, [n_cells](int64_t i) { return i < 0 || i >= n_cells; })) return false;
        cells_.emplace_back(indices, indices + n);
    }
    const int32_t *positions = static_cast<const int32_t *>(f.positions->data);
    positions_.assign(positions, positions + n);
    ids_.clear();
    if (f.tokens && f.tokens->ne[0] == n) {
        const int32_t *ids = static_cast<const int32_t *>(f.tokens->data);
        ids_.assign(ids, ids + n);
    }
    return true;
}

}  // namespace agq
