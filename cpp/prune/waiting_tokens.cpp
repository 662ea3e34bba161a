#include "prune/waiting_tokens.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "graph/mask_view.h"

namespace agq {

namespace {

/// Whether a part sees a cell. Its last token sees all that others see, unless there is a window.
bool sees(const ggml_tensor *mask, const ubatch_part &part, int32_t cell) {
    return !is_hidden(mask, cell, part.last(), 0) || !is_hidden(mask, cell, part.first, 0);
}

bool is_deferred_token(const early_token &token) {
    return token.is_deferred;
}

const char *const unknown_tokens = "the cache holds tokens that this context has not computed, or tokens of an image";

template <typename Predicate>
void erase_if(std::vector<early_token> *tokens, const Predicate &is_out) {
    tokens->erase(std::remove_if(tokens->begin(), tokens->end(), is_out), tokens->end());
}

}  // namespace

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
    if (!block) return nullptr;
    made_bytes_ += block->bytes();
    if (!has_told_size_ && block->rows) {
        has_told_size_ = true;
        log_line(log_info, "token pruning keeps " + std::to_string(row_bytes_) +
                               " bytes of each token of a prompt for later questions, at most " +
                               std::to_string(token_store::most_bytes >> 20) + " MiB");
    }
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
        // A threshold says how many dropped tokens a question brings back; with a share, the user does.
        const prune_stage &first_stage = planned_->plan().cuts[0].stage;
        const bool revives = tokens.is_known && (!first_stage.rule.by_share || first_stage.revive > 0);
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

void waiting_tokens::check_candidates(divided_ubatch *ubatch) const {
    for (size_t p = 0; p < ubatch->work.parts.size(); ++p) {
        part_work &work = ubatch->work.parts[p];
        if (!work.has_candidates()) continue;
        if (has_computed_ && facts().kinds.size() > 1) {
            // Windows hold tokens that they did not hold before.
            const std::vector<early_token> before = std::move(work.tokens.missing);
            work.tokens = find_early(ubatch->facts.parts[p].first, row_bytes_);
            erase_if(&work.tokens.missing, [&](const early_token &token) {
                return std::none_of(before.begin(), before.end(),
                                    [&](const early_token &t) { return t.cell == token.cell; });
            });
        }
        if (!graph_.fits(facts()) || !graph_.reaches(work.tokens)) work.tokens.missing.clear();
    }
}

std::vector<int32_t> waiting_tokens::find_open(const divided_ubatch *ubatch) {
    const int kind = find_kind();
    const ggml_tensor *mask = facts().kinds[static_cast<size_t>(kind)].mask;
    size_t last = facts().sites.size() - 1;
    while (facts().sites[last].kind != kind || !facts().owns_cache(last)) --last;
    std::vector<int32_t> open = deferred_.find(facts(), hidden_->cells(hidden_->level(static_cast<int>(last))));
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

/// The token of the ubatch that sees most of these cells, or -1. If tokens that wait are shared by sequences, those of
/// one window should be computed together.
int64_t waiting_tokens::find_row(const std::vector<int32_t> &cells) const {
    const ggml_tensor *mask = facts().kinds[static_cast<size_t>(sites_.kind)].mask;
    int64_t best = -1, most = 0;
    for (int64_t row = 0; row < mask->ne[1]; ++row) {
        const mask_row sees(mask, row, 0);
        const int64_t n = std::count_if(cells.begin(), cells.end(), [&](int32_t cell) { return !sees.hides(cell); });
        if (n <= most) continue;
        best = row;
        most = n;
        if (facts().kinds.size() == 1) break;
    }
    return best;
}

ggml_status waiting_tokens::compute(std::vector<int32_t> open, const segment_fn &segment) {
    if (!store_.has_rows()) return status_success;
    has_computed_ = true;
    for (int64_t row = find_row(open); row >= 0; row = find_row(open)) {
        const mask_row mask(facts().kinds[static_cast<size_t>(sites_.kind)].mask, row, 0);
        const auto seen = [&](int32_t cell) { return !mask.hides(cell); };
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
        if (!facts().owns_cache(s)) continue;
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
