// The part of waiting_tokens for attentions with a window, and for positions that change.
#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "graph/mask_view.h"
#include "prune/cell_rows.h"
#include "prune/waiting_tokens.h"

namespace agq {

namespace {

const char *const unknown_window = "a window holds tokens that this context has not computed";

}  // namespace

/// Finds how far in front of themselves the tokens of a part see others.
void waiting_tokens::find_distances(const early_tokens &before, const ubatch_part &part, token_block *block) const {
    const graph_facts &f = facts();
    if (f.kinds.size() == 1 || !before.is_known) return;
    std::vector<int32_t> positions = before.positions;
    const auto own = positions_.begin() + part.first;
    positions.insert(positions.end(), own, own + part.n);
    const size_t n_before = before.positions.size();
    for (const attention_kind &kind : f.kinds) {
        std::vector<int32_t> &distance = block->distance.emplace_back();
        for (int64_t t = part.first; t < part.end(); ++t) {
            const size_t end = n_before + static_cast<size_t>(t - part.first) + 1;
            const size_t seen = static_cast<size_t>(mask_row(kind.mask, t, 0).count_visible(kind.mask->ne[0]));
            distance.push_back(seen == 0 || seen > end ? -1 : positions[end - 1] - positions[end - seen]);
        }
    }
}

/// Calls `each` for the rows of the attentions in which a token was kept, with their cache.
template <typename Function>
void waiting_tokens::for_kept_rows(const kept_window &window, const Function &each) const {
    char *record = window.rows.get();
    for (const kept_layer &layer : kept_layers_) {
        if (layer.kind != window.kind || layer.site >= window.end_site) continue;
        const cell_rows &rows = layer.rows[static_cast<size_t>(window.stream)];
        each(rows, record);
        record += rows.bytes();
    }
}

/// Keeps what the window of a part that will wait needs of tokens which are computed already, because their cells may
/// be used again until the question comes. Returns the reason if that is not possible, else empty.
std::string waiting_tokens::find_kept(const early_tokens &before, const ubatch_part &part, token_block *kept) {
    const graph_facts &f = facts();
    if (f.kinds.size() == 1) return "";
    kept_layers_.clear();
    for (size_t s = static_cast<size_t>(sites_.cuts[0]) + 1; s < f.sites.size(); ++s) {
        if (!f.owns_cache(s)) continue;
        kept_layer &layer = kept_layers_.emplace_back();
        layer.site = static_cast<int>(s);
        layer.kind = f.sites[s].kind;
        for (int64_t i = 0; i < root_of(f.sites[s].cache)->ne[2]; ++i) {
            layer.rows.push_back(cell_rows::of(f, f.sites[s], i));
        }
    }
    for (size_t k = 0; k < f.kinds.size(); ++k) {
        if (sites_.is_sure && static_cast<int>(k) == sites_.kind) continue;
        const early_window &window = before.windows[k];
        const ggml_tensor *mask = f.kinds[k].mask;
        const size_t seen = static_cast<size_t>(mask_row(mask, part.first, 0).count_visible(mask->ne[0]));
        const size_t end = before.cells.size();
        if (seen == 0 || seen > end + 1) return unknown_window;
        for (size_t i = end + 1 - seen; i < end; ++i) {
            if (window.end_site[i] < 0) return unknown_window;
            if (window.end_site[i] <= sites_.next[k]) continue;  // no layer has it
            const size_t sure = static_cast<size_t>(sites_.kind);
            const stored_token *token = store_.find(sure, token_fingerprint(keys_[sure], before.cells[i]));
            if (!token) return unknown_window;
            std::shared_ptr<kept_window> its = token->kept(k);
            if (!its || its->end_site != window.end_site[i]) {
                if (window.cells[i] < 0) return unknown_window;
                its = std::make_shared<kept_window>();
                its->kind = static_cast<int>(k);
                its->end_site = window.end_site[i];
                its->stream = before.stream;
                its->cell = window.cells[i];
                size_t bytes = 0;
                for_kept_rows(*its, [&](const cell_rows &rows, char *) { bytes += rows.bytes(); });
                kept->window_bytes += bytes;
                if (kept->window_bytes > token_store::most_bytes) return "the store of waiting tokens is full";
                its->rows.reset(new char[bytes]);
                for_kept_rows(*its, [&](const cell_rows &rows, char *record) { rows.read(its->cell, record); });
                token->keep(k, its);
            }
            kept->windows.push_back(std::move(its));
        }
    }
    return "";
}

/// What was kept of a kind and is still in its cells, so that it can be read again after positions have changed. The
/// rest is forgotten, unless it does not change.
std::vector<kept_window *> waiting_tokens::find_kept_as_they_are(size_t kind) {
    std::vector<kept_window *> found;
    for (const std::shared_ptr<token_block> &block : store_.blocks()) {
        std::vector<std::shared_ptr<kept_window>> still;
        for (std::shared_ptr<kept_window> &window : block->windows) {
            bool is_same = true, may_move = window->may_move;
            if (static_cast<size_t>(window->kind) == kind) {
                for_kept_rows(*window, [&](const cell_rows &rows, const char *record) {
                    is_same = is_same && std::memcmp(rows.keys(window->cell), record, rows.key_bytes()) == 0;
                });
                if (is_same) found.push_back(window.get());
                window->may_move = true;
            } else {
                window->may_move = false;
            }
            if (is_same || !may_move) still.push_back(std::move(window));
        }
        block->windows.swap(still);
    }
    return found;
}

ggml_status waiting_tokens::run_shift(const std::function<ggml_status()> &compute) {
    const graph_facts &f = facts();
    // Which cache this graph turns: each kind of attention has its own.
    size_t kind = 0;
    const auto turns = [&](size_t k) {
        return std::any_of(f.tensors.begin(), f.tensors.end(), [&](const ggml_tensor *t) {
            const ggml_tensor *root = root_of(t);
            return root->data == roots_[k] && root->op == host.op_none;
        });
    };
    while (kind < roots_.size() && !turns(kind)) ++kind;
    if (kind == roots_.size()) return compute();
    const ggml_tensor *shift = nullptr;
    for (size_t i = static_cast<size_t>(f.n_nodes); i < f.tensors.size(); ++i) {
        const ggml_tensor *leaf = f.tensors[i];
        if (leaf->type == ggml_type_i32 && leaf->flags & ggml_flag_input && leaf->ne[0] == n_cells_[kind]) shift = leaf;
    }
    // Cells that do not move are turned by nothing, which changes signs of zeros, and so marks, too.
    struct turned {
        int64_t cell;
        uint64_t fingerprint;
        int32_t shift;
        bool is_deferred;
    };
    std::vector<turned> all;
    const key_rows &keys = keys_[kind], &next = next_keys_[kind];
    const std::vector<char> mark = deferral_mark(next);
    for (int64_t i = 0; shift && i < n_cells_[kind]; ++i) {
        const int64_t c = i - first_of_stream_[kind];
        all.push_back(
            {c, token_fingerprint(keys, c), static_cast<const int32_t *>(shift->data)[i], is_deferred(next, c, mark)});
    }
    const std::vector<kept_window *> kept = find_kept_as_they_are(kind);
    const ggml_status status = compute();
    if (status != status_success) return status;
    for (const kept_window *window : kept) {
        for_kept_rows(*window, [&](const cell_rows &rows, char *record) { rows.read(window->cell, record); });
    }
    std::unordered_set<uint64_t> still;
    for (const turned &t : all) {
        const uint64_t now = token_fingerprint(keys, t.cell);
        still.insert(now);
        const stored_token *token = store_.find(kind, t.fingerprint);
        for (size_t k = 0; token && t.shift != 0 && k < turns_.size(); ++k) {
            if (!turns_[k] && k != kind) store_.move(k, *token, t.shift);
            const auto its = token->kept(k);
            if (its && k != kind) its->may_move = true;
        }
        if (now != t.fingerprint) store_.rename(kind, t.fingerprint, now, t.shift);
        if (t.is_deferred) std::memcpy(const_cast<char *>(next.row(t.cell, 0)), mark.data(), mark.size());
    }
    for (const turned &t : all) {
        if (still.count(t.fingerprint) == 0) store_.forget(kind, t.fingerprint);
    }
    return status;
}

}  // namespace agq
