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
bool sees(const graph_facts &facts, const ubatch_part &part, int32_t cell) {
    return !is_hidden(facts.mask, cell, part.last(), 0) || !is_hidden(facts.mask, cell, part.first, 0);
}

bool is_deferred_token(const early_token &token) {
    return token.is_deferred;
}

template <typename Predicate>
void erase_if(std::vector<early_token> *tokens, const Predicate &is_out) {
    tokens->erase(std::remove_if(tokens->begin(), tokens->end(), is_out), tokens->end());
}

}  // namespace

/// Whether this context prunes by heads, and so that tokens can wait for their question.
bool waiting_tokens::asks() {
    if (asks_ == answer::unknown && facts().complete && !facts().sites.empty()) {
        asks_ = planned_->asks() ? answer::yes : answer::no;
        if (asks_ == answer::yes) first_layer_ = planned_->stages()[0].layer;
    }
    return asks_ == answer::yes;
}

bool waiting_tokens::may_begin_to_wait() {
    const graph_facts &f = facts();
    if (!f.out_ids || f.out_ids->ne[0] >= f.n_tokens() || f.kinds.size() != 1 || !f.positions || !asks()) return false;
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
    if (n == 0 || !asks() || !f.complete || f.kinds.size() != 1 || !f.positions || !f.k_cells ||
        f.positions->ne[0] != n || f.k_cells->ne[0] != n || f.mask->ne[1] * f.mask->ne[3] != n) {
        return false;
    }
    int site = 0;
    // Keys of the first layer do not depend on the tokens in front.
    if (!find_site(f, first_layer_, &site).empty() || site < 1) return false;
    const auto has_alibi = [](const attention_site &s) { return s.max_bias != 0; };
    if (std::any_of(f.sites.begin(), f.sites.end(), has_alibi)) return false;
    site_ = static_cast<size_t>(site);
    keys_ = key_rows::of(f.sites[site_].cache);
    next_keys_ = key_rows::of(f.sites[site_ + 1].cache);
    const ggml_tensor *cache = root_of(f.sites[site_].cache);
    n_cells_ = cache->ne[1] * cache->ne[2];
    if (f.mask->ne[3] == 1) {
        // The cells of one stream may begin in the middle of the cache.
        first_of_stream_ = cell_offset(f.sites[site_]);
        if (own_cells[0].size() != static_cast<size_t>(n)) return false;
        cells_ = own_cells[0];
    } else {
        first_of_stream_ = 0;
        keys_.base = static_cast<const char *>(cache->data);
        next_keys_.base = static_cast<const char *>(root_of(f.sites[site_ + 1].cache)->data);
        const int64_t *indices = static_cast<const int64_t *>(f.k_cells->data);
        if (std::any_of(indices, indices + n, [this](int64_t i) { return i < 0 || i >= n_cells_; })) return false;
        cells_.assign(indices, indices + n);
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

/// Whether the cache still holds a deferred token of the block.
bool waiting_tokens::is_needed(const token_block &block) const {
    const std::vector<char> mark = deferral_mark(next_keys_);
    for (size_t i = 0; i < block.cells.size(); ++i) {
        // From the stream of this ubatch to that of the block.
        const int64_t cell = block.first_of_stream - first_of_stream_ + block.cells[i];
        if (is_deferred(next_keys_, cell, mark) && token_fingerprint(keys_, cell) == block.fingerprints[i]) return true;
    }
    return false;
}

void waiting_tokens::begin(ubatch_work *work) {
    const prune_plan &plan = planned_->plan();
    work->record = record_of(facts(), plan.dims, plan.cuts[0].crossing, true);
    work->mark = deferral_mark(next_keys_);
    work->graph = &graph_;
    row_bytes_ = work->record.bytes;
    made_bytes_ = 0;
}

std::shared_ptr<token_block> waiting_tokens::make_block(const ubatch_part &part) {
    const size_t n = static_cast<size_t>(part.n);
    const auto needed = [this](const token_block &block) { return is_needed(block); };
    std::shared_ptr<token_block> block = store_.make_block(n, row_bytes_, made_bytes_, needed);
    if (block) made_bytes_ += n * row_bytes_;
    return block;
}

void waiting_tokens::reserve(const ubatch_part &part, part_work *work) {
    work->block = make_block(part);
}

std::string waiting_tokens::defer(const ubatch_facts &ubatch, const ubatch_part &part, part_work *work) {
    const auto wanted = ubatch.wanted.begin() + part.first;
    if (std::any_of(wanted, wanted + part.n, [](uint8_t is) { return is != 0; })) {
        return "logits of a token within it are requested";
    }
    if (part.views[0].has_window) return "the attention has a sliding window";
    std::string obstacle = find_value_obstacle(facts(), cells_);
    if (!obstacle.empty()) return obstacle;
    const early_tokens before = find_early_tokens(facts(), part.first, cells_, site_, *hidden_, store_, row_bytes_);
    if (!before.is_known) return "the cache holds tokens that this context has not computed";
    const prune_plan &plan = planned_->plan();
    const int32_t end = *std::max_element(cells_.begin(), cells_.end());
    if (!graph_.fits(facts()) || !graph_.reaches_cell(end) || graph_.tokens() < plan.tokens) {
        const std::string reason = graph_.capture(facts(), plan);
        if (!reason.empty()) return reason;
    }
    work->block = make_block(part);
    if (!work->block) return "the store of waiting tokens is full";
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
    if (store_.has_rows() && !part.views[0].has_window) {
        early_tokens &tokens = work->tokens;
        tokens = find_early_tokens(facts(), part.first, cells_, site_, *hidden_, store_, row_bytes_);
        // Only a threshold says how many dropped tokens a question brings back.
        const bool revives = tokens.is_known && !planned_->plan().cuts[0].stage.rule.by_share;
        erase_if(&tokens.missing, [&](const early_token &token) {
            if (!token.is_deferred && !revives) return true;
            // What several sequences see, none of them chooses.
            const auto shares = [&](const ubatch_part &other) {
                return &other != &part && sees(facts(), other, token.cell);
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
        if (plan.obstacle.empty() && !plan.cuts.empty() && graph_.capture(facts(), plan).empty() &&
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
    // Where there are several kinds of attention, no token waits.
    if (facts().kinds.size() != 1) return {};
    const int last = static_cast<int>(facts().sites.size()) - 1;
    std::vector<int32_t> open = deferred_.find(facts(), hidden_->cells(hidden_->level(last)));
    if (!ubatch) return open;
    std::vector<uint8_t> is_open(static_cast<size_t>(facts().mask->ne[0]), 0);
    for (size_t p = 0; p < ubatch->facts.parts.size() && !open.empty(); ++p) {
        const part_work &work = ubatch->work.parts[p];
        if (work.what == part_work::kind::defer) continue;
        std::vector<uint8_t> is_candidate(is_open.size(), 0);
        for (const early_token &token : work.tokens.missing) is_candidate[static_cast<size_t>(token.cell)] = 1;
        for (int32_t cell : open) {
            const size_t c = static_cast<size_t>(cell);
            is_open[c] = is_open[c] || (!is_candidate[c] && sees(facts(), ubatch->facts.parts[p], cell));
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
    for (int64_t row = 0; row < facts().mask->ne[1] && !open.empty(); ++row) {
        const mask_row mask(facts().mask, row, 0);
        const auto seen = [&](int32_t cell) { return !mask.hides(cell); };
        if (std::none_of(open.begin(), open.end(), seen)) continue;
        early_tokens tokens = find_early_tokens(facts(), row, cells_, site_, *hidden_, store_, graph_.record_bytes());
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
    const std::vector<char> mark = deferral_mark(next_keys_);
    for (const early_token &token : tokens.missing) {
        if (!token.is_deferred) continue;
        for (size_t s = site_ + 1; s < facts().sites.size(); ++s) {
            const key_rows rows = key_rows::of(facts().sites[s].cache);
            std::memset(const_cast<char *>(rows.row(token.cell, 0)), 0, rows.row_bytes);
        }
        std::memcpy(const_cast<char *>(next_keys_.row(token.cell, 0)), mark.data(), mark.size());
    }
}

ggml_status waiting_tokens::run_shift(const std::function<ggml_status()> &compute) {
    const graph_facts &f = facts();
    const ggml_tensor *shift = nullptr;
    for (size_t i = static_cast<size_t>(f.n_nodes); i < f.tensors.size(); ++i) {
        const ggml_tensor *leaf = f.tensors[i];
        if (leaf->type == ggml_type_i32 && leaf->flags & ggml_flag_input && leaf->ne[0] == n_cells_) shift = leaf;
    }
    // Cells that do not move are turned by nothing, which changes signs of zeros, and so marks, too.
    struct turned {
        int64_t cell;
        uint64_t fingerprint;
        int32_t shift;
        bool is_deferred;
    };
    std::vector<turned> all;
    const std::vector<char> mark = deferral_mark(next_keys_);
    for (int64_t i = 0; shift && i < n_cells_; ++i) {
        const int64_t c = i - first_of_stream_;
        all.push_back({c, token_fingerprint(keys_, c), static_cast<const int32_t *>(shift->data)[i],
                       is_deferred(next_keys_, c, mark)});
    }
    const ggml_status status = compute();
    if (status != status_success) return status;
    std::unordered_set<uint64_t> still;
    for (const turned &t : all) {
        const uint64_t now = token_fingerprint(keys_, t.cell);
        still.insert(now);
        if (now != t.fingerprint) store_.rename(t.fingerprint, now, t.shift);
        if (t.is_deferred) {
            std::memcpy(const_cast<char *>(next_keys_.row(t.cell, 0)), mark.data(), mark.size());
        }
    }
    for (const turned &t : all) {
        if (still.count(t.fingerprint) == 0) store_.forget(t.fingerprint);
    }
    return status;
}

void waiting_tokens::store(const divided_ubatch *ubatch) {
    if (!ubatch) return store_part(0, cells_.size(), nullptr);
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
    block->cells = slice(cells_);
    block->first_of_stream = first_of_stream_;
    for (int32_t cell : block->cells) block->fingerprints.push_back(token_fingerprint(keys_, cell));
    store_.put(block, slice(positions_), slice(ids_));
}

}  // namespace agq
