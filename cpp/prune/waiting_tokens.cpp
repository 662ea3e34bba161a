#include "prune/waiting_tokens.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <unordered_set>

#include "graph/mask_view.h"
#include "graph/token_cut.h"

namespace agq {

namespace {

/// Whether a part sees a cell. Its last token sees all that others see, unless there is a window.
bool sees(const ggml_tensor *mask, const ubatch_part &part, int32_t cell) {
    return !is_hidden(mask, cell, part.last(), 0) || !is_hidden(mask, cell, part.first, 0);
}

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

bool is_deferred_token(const early_token &token) {
    return token.is_deferred;
}

const char *const unknown_tokens = "the cache holds tokens that this context has not computed";

template <typename Predicate>
void erase_if(std::vector<early_token> *tokens, const Predicate &is_out) {
    tokens->erase(std::remove_if(tokens->begin(), tokens->end(), is_out), tokens->end());
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
        if (s <= sites_.cuts[0]) sites_.keys[kind] = s;
        if (s > sites_.cuts[0] && sites_.next[kind] < 0) sites_.next[kind] = s;
        if (site.kind == sites_.kind) sites_.last = s;
        if (site.max_bias != 0) return "attention depends on distances";
    }
    for (size_t k = 0; k < f.kinds.size(); ++k) {
        // Keys of the first layer do not depend on the tokens in front.
        if (sites_.keys[k] >= 1 && sites_.next[k] >= 0) continue;
        return f.kinds.size() == 1 ? "layer 0 cannot be the first pruning layer"
                                   : "layers with and without a sliding window must both come after layer 0 up to the "
                                     "first pruning layer, and both behind it";
    }
    return "";
}

bool waiting_tokens::may_begin_to_wait() {
    const graph_facts &f = facts();
    if (!f.out_ids || f.out_ids->ne[0] >= f.n_tokens() || !f.positions || !asks()) return false;
    if (f.positions->ne[0] != f.n_tokens()) return false;
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
    if (n == 0 || !asks() || !f.complete || !f.positions || f.positions->ne[0] != n) return false;
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
        turns_.push_back(has_turned_keys(f, cache));
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

early_tokens waiting_tokens::find_early(int64_t row, size_t row_bytes) const {
    return find_early_tokens(facts(), row, cells_, sites_, *hidden_, store_, row_bytes);
}

/// Whether the cache still holds a deferred token of the block.
bool waiting_tokens::is_needed(const token_block &block) const {
    for (size_t k = 0; k < block.cells.size() && k < keys_.size(); ++k) {
        const std::vector<char> mark = deferral_mark(next_keys_[k]);
        for (size_t i = 0; i < block.cells[k].size(); ++i) {
            // From the stream of this ubatch to that of the block.
            const int64_t cell = block.first_of_stream[k] - first_of_stream_[k] + block.cells[k][i];
            if (is_deferred(next_keys_[k], cell, mark) &&
                token_fingerprint(keys_[k], cell) == block.fingerprints[k][i]) {
                return true;
            }
        }
    }
    return false;
}

void waiting_tokens::begin(ubatch_work *work) {
    const prune_plan &plan = planned_->plan();
    work->record = record_of(facts(), plan.dims, plan.cuts[0].crossing, true);
    work->mark = deferral_mark(next_keys_[0]);
    work->graph = &graph_;
    row_bytes_ = work->record.bytes;
    made_bytes_ = 0;
}

std::shared_ptr<token_block> waiting_tokens::make_block(const ubatch_part &part, size_t window_bytes) {
    const size_t n = static_cast<size_t>(part.n);
    const auto needed = [this](const token_block &block) { return is_needed(block); };
    std::shared_ptr<token_block> block = store_.make_block(n, row_bytes_, window_bytes, made_bytes_, needed);
    if (block) made_bytes_ += n * row_bytes_ + window_bytes;
    return block;
}

void waiting_tokens::reserve(const ubatch_part &part, part_work *work) {
    work->block = make_block(part, 0);
}

std::string waiting_tokens::defer(const ubatch_facts &ubatch, const ubatch_part &part, part_work *work) {
    const auto wanted = ubatch.wanted.begin() + part.first;
    if (std::any_of(wanted, wanted + part.n, [](uint8_t is) { return is != 0; })) {
        return "logits of a token within it are requested";
    }
    if (part.views[static_cast<size_t>(sites_.kind)].has_window) return "the attention has a sliding window";
    std::string obstacle = find_value_obstacle(facts(), cells_);
    if (!obstacle.empty()) return obstacle;
    const early_tokens before = find_early(part.first, row_bytes_);
    if (!before.is_known) return unknown_tokens;
    const prune_plan &plan = planned_->plan();
    if (!graph_.fits(facts()) || !graph_.reaches_all_of(facts()) || graph_.tokens() < plan.tokens) {
        const std::string reason = graph_.capture(facts(), plan, sites_);
        if (!reason.empty()) return reason;
    }
    token_block kept;
    obstacle = find_kept(before, part, &kept);
    if (!obstacle.empty()) return obstacle;
    work->block = make_block(part, kept.window_bytes);
    if (!work->block) return "the store of waiting tokens is full";
    work->block->windows = std::move(kept.windows);
    find_distances(before, part, work->block.get());
    work->what = part_work::kind::defer;
    return "";
}

void waiting_tokens::find_candidates(divided_ubatch *ubatch) {
    for (size_t p = 0; p < ubatch->work.parts.size(); ++p) {
        part_work &work = ubatch->work.parts[p];
        if (work.what == part_work::kind::prune) find_candidates_of(*ubatch, p, &work);
    }
}

void waiting_tokens::find_candidates_of(const divided_ubatch &ubatch, size_t index, part_work *work) {
    const ubatch_part &part = ubatch.facts.parts[index];
    const size_t kind = static_cast<size_t>(sites_.kind);
    const bool is_first = !store_.has_rows() && facts().kinds.size() == 1;  // there is nothing to find
    if (!is_first && !part.views[kind].has_window) {
        early_tokens &tokens = work->tokens;
        tokens = find_early(part.first, row_bytes_);
        if (work->block) find_distances(tokens, part, work->block.get());
        // Only a threshold says how many dropped tokens a question brings back.
        const bool revives = tokens.is_known && !planned_->plan().cuts[0].stage.rule.by_share;
        erase_if(&tokens.missing, [&](const early_token &token) {
            if (!token.is_deferred && !revives) return true;
            // What several sequences see, none of them chooses.
            const auto shares = [&](const ubatch_part &other) {
                return &other != &part && sees(facts().kinds[kind].mask, other, token.cell);
            };
            return std::any_of(ubatch.facts.parts.begin(), ubatch.facts.parts.end(), shares);
        });
        const int64_t n_deferred = std::count_if(tokens.missing.begin(), tokens.missing.end(), is_deferred_token);
        const bool is_short = part.n + n_deferred < planned_->settings().min_tokens;
        work->keeps_own = is_short;
        const bool is_kept = is_short && n_deferred > 0;
        if (is_kept || (work->has_candidates() && !prepare_graph(tokens))) tokens.missing.clear();
        if (is_kept) work->what = part_work::kind::keep;
    }
    const bool is_long = part.n >= planned_->settings().min_tokens;
    if (!is_long && !work->has_candidates()) work->what = part_work::kind::keep;
    if (work->what == part_work::kind::keep) work->block = nullptr;
}

/// Makes sure that the early graph can compute these tokens.
bool waiting_tokens::prepare_graph(const early_tokens &tokens) {
    if (graph_.fits(facts()) && graph_.reaches(tokens)) return true;
    if (facts().n_tokens() > 1 && facts().complete) {
        const prune_plan &plan = planned_->plan();
        if (plan.obstacle.empty() && !plan.cuts.empty() && graph_.capture(facts(), plan, sites_).empty() &&
            graph_.reaches(tokens)) {
            return true;
        }
    }
    return false;
}

void waiting_tokens::check_candidates(ubatch_work *work) const {
    for (part_work &part : work->parts) {
        if (!graph_.fits(facts()) || !graph_.reaches(part.tokens)) part.tokens.missing.clear();
    }
}

std::vector<int32_t> waiting_tokens::find_open(const divided_ubatch *ubatch) {
    const int kind = find_kind();
    const ggml_tensor *mask = facts().kinds[static_cast<size_t>(kind)].mask;
    int last = static_cast<int>(facts().sites.size()) - 1;
    while (facts().sites[static_cast<size_t>(last)].kind != kind) --last;
    std::vector<int32_t> open = deferred_.find(facts(), hidden_->cells(hidden_->level(last)));
    if (!ubatch) return open;
    std::vector<uint8_t> is_open(static_cast<size_t>(mask->ne[0]), 0);
    for (size_t p = 0; p < ubatch->facts.parts.size() && !open.empty(); ++p) {
        const part_work &work = ubatch->work.parts[p];
        if (work.what == part_work::kind::defer) continue;
        std::vector<uint8_t> is_candidate(is_open.size(), 0);
        for (const early_token &token : work.tokens.missing) is_candidate[static_cast<size_t>(token.cell)] = 1;
        for (int32_t cell : open) {
            const size_t c = static_cast<size_t>(cell);
            is_open[c] = is_open[c] || (!is_candidate[c] && sees(mask, ubatch->facts.parts[p], cell));
        }
    }
    const auto is_closed = [&](int32_t cell) { return !is_open[static_cast<size_t>(cell)]; };
    open.erase(std::remove_if(open.begin(), open.end(), is_closed), open.end());
    return open;
}

void waiting_tokens::warn_of_lost(const std::vector<int32_t> &open) {
    if (has_warned_ || open.empty()) return;
    has_warned_ = true;
    log_line(log_warn,
             "token pruning: the beginning of a prompt is not seen, because its state was saved before the question "
             "came and loaded in another context, or too much was computed since; compute the prompt again");
}

ggml_status waiting_tokens::compute(std::vector<int32_t> open, const segment_fn &segment) {
    if (!store_.has_rows()) return status_success;
    const ggml_tensor *of_kind = facts().kinds[static_cast<size_t>(sites_.kind)].mask;
    for (int64_t row = 0; row < of_kind->ne[1] && !open.empty(); ++row) {
        const mask_row mask(of_kind, row, 0);
        const auto seen = [&](int32_t cell) { return !mask.hides(cell); };
        if (std::none_of(open.begin(), open.end(), seen)) continue;
        early_tokens tokens = find_early(row, graph_.record_bytes());
        erase_if(&tokens.missing, [&](const early_token &token) {
            return !token.is_deferred || std::find(open.begin(), open.end(), token.cell) == open.end();
        });
        open.erase(std::remove_if(open.begin(), open.end(), seen), open.end());
        if (tokens.missing.empty() || !prepare_graph(tokens)) continue;
        early_pass pass;
        pass.begin(tokens);
        std::vector<int32_t> all(tokens.missing.size());
        std::iota(all.begin(), all.end(), 0);
        for (size_t s = 1; s < graph_.segments(); ++s) {
            const ggml_status status = graph_.run(s, &pass, all, *hidden_, facts().tensors[0]->buffer, segment);
            if (status != status_success) {
                defer_again(tokens);
                return status;
            }
        }
        hidden_->find(facts());  // other sequences may see these tokens, too
    }
    return status_success;
}

void waiting_tokens::defer_again(const early_tokens &tokens) {
    if (tokens.missing.empty()) return;
    for (size_t s = static_cast<size_t>(tokens.first_cut) + 1; s < facts().sites.size(); ++s) {
        const key_rows rows = key_rows::of(facts().sites[s].cache);
        const int kind = facts().sites[s].kind;
        const bool is_first = static_cast<int>(s) == sites_.next[static_cast<size_t>(kind)];
        const std::vector<char> mark = is_first ? deferral_mark(rows) : std::vector<char>{};
        for (const early_token &token : tokens.missing) {
            const int32_t cell = tokens.cell_of(kind, token.place);
            if (!token.is_deferred || cell < 0) continue;
            char *row = const_cast<char *>(rows.row(cell, 0));
            std::memset(row, 0, rows.row_bytes);
            if (is_first) std::memcpy(row, mark.data(), mark.size());
        }
    }
}

void waiting_tokens::store(const divided_ubatch *ubatch) {
    if (!ubatch) return store_part(0, positions_.size(), nullptr);
    for (size_t p = 0; p < ubatch->facts.parts.size(); ++p) {
        const ubatch_part &part = ubatch->facts.parts[p];
        store_part(static_cast<size_t>(part.first), static_cast<size_t>(part.n), ubatch->work.parts[p].block);
    }
}

void waiting_tokens::store_part(size_t first, size_t n, std::shared_ptr<token_block> block) {
    if (!block) block = std::make_shared<token_block>();
    const auto slice = [&](const std::vector<int32_t> &all) {
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first);
        return all.empty() ? all : std::vector<int32_t>(begin, begin + static_cast<std::ptrdiff_t>(n));
    };
    for (size_t k = 0; k < cells_.size(); ++k) {
        block->cells.push_back(slice(cells_[k]));
        block->first_of_stream.push_back(first_of_stream_[k]);
        std::vector<uint64_t> &fingerprints = block->fingerprints.emplace_back();
        for (int32_t cell : block->cells[k]) fingerprints.push_back(token_fingerprint(keys_[k], cell));
    }
    store_.put(block, slice(positions_), slice(ids_));
}

}  // namespace agq
