#include "prune/part_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "host/tensor_rows.h"
#include "scores/selection.h"

namespace agq {

namespace {

/// The size of a token's queries in all measured attentions before that with index `end`.
size_t query_floats(const run_input &in, int end) {
    int64_t floats = 0;
    for (const head_site &p : in.plan.probes) {
        const ggml_tensor *q = in.facts.sites[static_cast<size_t>(p.site)].q;
        if (p.site < end) floats += q->ne[0] * q->ne[2];
    }
    return static_cast<size_t>(floats);
}

}  // namespace

void part_run::begin(const run_input &in, size_t index) {
    ubatch_ = &in.ubatch;
    part_ = &in.ubatch.parts[index];
    work_ = &in.work.parts[index];
    alive_.resize(static_cast<size_t>(part_->n));
    std::iota(alive_.begin(), alive_.end(), static_cast<int32_t>(part_->first));
    early_alive_.resize(work_->tokens.missing.size());
    std::iota(early_alive_.begin(), early_alive_.end(), 0);
    early_before_.clear();
    layer_of_token_.assign(alive_.size(), -1);
    layer_of_early_.assign(early_alive_.size(), -1);
    importance_.clear();
    head_weights_.clear();
    early_.begin(work_->tokens);
}

/// The tokens that are left: candidates of earlier ubatches, then, after all candidates, those of this part.
std::vector<int32_t> part_run::places() const {
    std::vector<int32_t> found(early_alive_);
    const int32_t shift = static_cast<int32_t>(layer_of_early_.size()) - static_cast<int32_t>(part_->first);
    for (int32_t token : alive_) found.push_back(shift + token);
    return found;
}

score_meter &part_run::meter_of(const prune_cut &cut) {
    std::unique_ptr<score_meter> &meter = meters_[cut.stage.measure];
    if (!meter) meter = cut.stage.measure->make_meter(kern_);
    return *meter;
}

/// Tells a meter which tokens are left.
void part_run::set_tokens(const run_input &in, int kind, int64_t first_row, score_meter *meter) const {
    const std::vector<int32_t> &own = ubatch_->cells[static_cast<size_t>(kind)];
    score_tokens &tokens = meter->tokens;
    tokens.rows.resize(alive_.size());
    tokens.positions.resize(alive_.size());
    tokens.cells.resize(early_alive_.size() + alive_.size());
    int32_t *cell = tokens.cells.data();
    for (int32_t i : early_alive_) {
        *cell++ = work_->tokens.cell_of(kind, work_->tokens.missing[static_cast<size_t>(i)].place);
    }
    for (size_t i = 0; i < alive_.size(); ++i) {
        tokens.rows[i] = in.mask_only ? alive_[i] : static_cast<int32_t>(first_row) + static_cast<int32_t>(i);
        *cell++ = own[static_cast<size_t>(alive_[i])];
        tokens.positions[i] = part_->position + alive_[i] - static_cast<int32_t>(part_->first);
    }
    tokens.first_cell = part_->views[static_cast<size_t>(kind)].first_cell;
}

void part_run::add_meter(const run_input &in, const prune_cut &cut, const score_source &source, int64_t first_row,
                         run_nodes *to) {
    score_meter &meter = meter_of(cut);
    set_tokens(in, in.facts.sites[static_cast<size_t>(cut.site)].kind, first_row, &meter);
    meter.prepare(source, in.n_threads);
    to->add(measure_node, &meter);
}

void part_run::add_probe(const run_input &in, const head_site &heads, const score_source &source, int64_t first_row,
                         run_nodes *to) {
    head_probe &probe = probes_.try_emplace(heads.site, kern_).first->second;
    probe.heads = heads.heads;
    set_tokens(in, in.facts.sites[static_cast<size_t>(heads.site)].kind, first_row, &probe);
    score_source with_early = source;
    if (work_->has_candidates()) add_observers(in, heads.site, &with_early, &probe, to);
    probe.prepare(with_early, in.n_threads);
    to->add(measure_node, static_cast<score_meter *>(&probe));
}

/// If the part has too few tokens to observe the others, the last ones in front of it do so, too.
void part_run::add_observers(const run_input &in, int site, score_source *source, score_meter *meter, run_nodes *to) {
    const ggml_tensor *q = source->site.q;
    const early_tokens &early = work_->tokens;
    const size_t n_own = alive_.size();
    // The attentions up to the first cut have run for these tokens already.
    const size_t offset = query_floats(in, site);
    const auto token_at = [&](size_t back) -> const early_token & {
        return early.missing[static_cast<size_t>(early_alive_[early_alive_.size() - 1 - back])];
    };
    const auto queries_of = [&](size_t back) -> const float * {
        if (site > in.plan.cuts[0].site) return early_.queries(site, back);
        return token_at(back).queries ? token_at(back).queries + offset : nullptr;
    };
    const int kind = in.facts.sites[static_cast<size_t>(site)].kind;
    const auto is_seen = [&](size_t back) {
        return source->keys.column_of(early.cell_of(kind, token_at(back).place)) != key_group::no_column;
    };
    size_t n_more = 0;
    while (n_own + n_more < observing_tokens && n_more < early_alive_.size() && queries_of(n_more) && is_seen(n_more)) {
        ++n_more;
    }
    if (n_more == 0) return;
    const int64_t rows = static_cast<int64_t>(n_more + n_own), width = q->ne[0], heads = q->ne[2];
    const size_t stride = static_cast<size_t>(source->keys.n) * source->site.mask->nb[0];
    const bool is_f16 = source->site.mask->type == ggml_type_f16;
    ggml_tensor *all = to->arena.copy(q);
    all->ne[1] = rows;
    make_contiguous(all);
    all->data = to->arena.memory(host.ggml_nbytes(all));
    char *seen = to->arena.memory(stride * static_cast<size_t>(rows));
    // What earlier tokens see follows from positions; cells of this ubatch come later.
    std::vector<int32_t> columns, counts, firsts, order;
    const attention_site &at = in.facts.sites[static_cast<size_t>(site)];
    const std::vector<int32_t> &with_keys = early_alive_after(cuts_before_cache(in.plan, at));
    for (int32_t place : early_.order_of(in.hidden, kind, at.owner, with_keys)) {
        // Tokens that have left the part's window are not among the keys.
        const int32_t column = source->keys.column_of(early.cell_of(kind, place));
        if (column == key_group::no_column) continue;
        order.push_back(place);
        columns.push_back(column);
    }
    for (size_t row = 0; row < n_more; ++row) {
        const size_t back = n_more - 1 - row;
        const int32_t place = token_at(back).place;
        const auto end = std::upper_bound(order.begin(), order.end(), place);
        counts.push_back(static_cast<int32_t>(end - order.begin()));
        const int32_t first =
            kind == early.kind ? 0 : early.windows[static_cast<size_t>(kind)].first[static_cast<size_t>(place)];
        firsts.push_back(static_cast<int32_t>(std::lower_bound(order.begin(), order.end(), first) - order.begin()));
        for (int64_t h = 0; h < heads; ++h) {
            std::memcpy(row_address(all, static_cast<int64_t>(row), h, 0), queries_of(back) + h * width,
                        sizeof(float) * static_cast<size_t>(width));
        }
    }
    cut_job &job = to->jobs.emplace_back();
    job.ordered_masks.push_back(
        {seen, stride, source->keys.n, is_f16, false, &to->lists.emplace_back(std::move(columns)),
         &to->lists.emplace_back(std::move(counts)), &to->lists.emplace_back(std::move(firsts))});
    const int64_t first_row = meter->tokens.rows[0];
    std::vector<int32_t> &own = to->lists.emplace_back(meter->tokens.rows);
    for (int32_t &row : own) row -= static_cast<int32_t>(source->keys.first_token);
    job.masks.push_back({source->keys.mask, seen + n_more * stride, source->keys.mask_stride, stride,
                         static_cast<int64_t>(n_own), source->keys.n, is_f16, &own, nullptr, nullptr});
    job.observers.push_back({q, static_cast<float *>(all->data) + static_cast<int64_t>(n_more) * width, first_row,
                             static_cast<int64_t>(n_own), width, width * rows});
    to->add_job();
    source->site.q = all;
    source->keys.first_token = 0;
    source->keys.mask = seen;
    source->keys.mask_stride = stride;
    meter->tokens.rows.resize(static_cast<size_t>(rows));
    std::iota(meter->tokens.rows.begin(), meter->tokens.rows.end(), 0);
}

void part_run::add_store_of_queries(const run_input &in, int site, const ggml_tensor *q, run_nodes *to) const {
    const int64_t n = std::min<int64_t>(part_->n, observing_tokens);
    token_block &block = *work_->block;
    const size_t all = query_floats(in, in.plan.cuts[0].site + 1);
    block.query_floats = all;
    block.queries.resize(static_cast<size_t>(n) * all);
    to->jobs.emplace_back().observers.push_back(
        {q, block.queries.data() + query_floats(in, site), part_->end() - n, n, static_cast<int64_t>(all), q->ne[0]});
    to->add_job();
}

void part_run::keep_weights(const run_input &in, const head_site &heads) {
    const std::vector<int32_t> left = places();
    const head_probe &probe = probes_.at(heads.site);
    for (size_t h = 0; h < heads.heads.size(); ++h) {
        const int layer = in.facts.sites[static_cast<size_t>(heads.site)].layer;
        std::vector<float> &weights = head_weights_[{layer, heads.heads[h]}];
        std::vector<float> largest = probe.largest(h);
        const size_t all = layer_of_early_.size() + layer_of_token_.size();
        if (left.size() == all) {  // no token has left yet
            weights = std::move(largest);
            continue;
        }
        weights.assign(all, NAN);
        for (size_t i = 0; i < left.size(); ++i) weights[static_cast<size_t>(left[i])] = largest[i];
    }
}

/// The importance of each token that is left.
std::vector<float> part_run::measured(const run_input &in, const prune_cut &cut, const std::vector<int32_t> &left,
                                      const std::vector<uint8_t> &is_protected) {
    if (cut.stage.measure->input != score_input::heads) {
        score_meter &meter = meter_of(cut);
        if (cut.stage.measure->input == score_input::position) {
            score_source source;
            source.layer = cut.stage.layer;
            set_tokens(in, 0, 0, &meter);
            meter.prepare(source, in.n_threads);
        }
        return spread(meter.result(), cut.stage.reach);
    }
    std::vector<std::vector<float>> measures;
    std::vector<int> reach;
    const auto add = [&](const std::vector<float> &by_token, int its_reach) {
        std::vector<float> &values = measures.emplace_back(left.size());
        for (size_t i = 0; i < left.size(); ++i) values[i] = by_token[static_cast<size_t>(left[i])];
        reach.push_back(its_reach);
    };
    for (const attention_head &head : cut.heads) add(head_weights_.at(head), cut.stage.reach);
    if (cut.stage.heads.tail != head_choice::no_overlap) {
        std::vector<int32_t> ids;
        ids.reserve(layer_of_early_.size() + layer_of_token_.size());
        for (const early_token &token : work_->tokens.missing) ids.push_back(token.id);
        ids.insert(ids.end(), ubatch_->ids.begin() + part_->first, ubatch_->ids.begin() + part_->end());
        add(word_overlap(ids, cut.stage.heads.tail), 0);
    }
    std::vector<uint8_t> is_candidate(is_protected);
    for (uint8_t &is : is_candidate) is = !is;
    return mean_share(measures, reach, is_candidate,
                      static_cast<int64_t>(layer_of_early_.size() + layer_of_token_.size()));
}

/// Which of the tokens that are left stay whatever their importance.
std::vector<uint8_t> part_run::find_protected(const prune_cut &cut, const std::vector<int32_t> &left) const {
    const int64_t n_early = static_cast<int64_t>(layer_of_early_.size()), end = n_early + part_->n - cut.stage.keep;
    std::vector<uint8_t> is_protected(left.size(), 0);
    for (size_t i = 0; i < left.size(); ++i) {
        const bool is_own = left[i] >= n_early;
        const size_t token = static_cast<size_t>(is_own ? left[i] - n_early : left[i]);
        const early_token *early = is_own ? nullptr : &work_->tokens.missing[token];
        const bool is_last = i + static_cast<size_t>(cut.stage.measure->protected_last) >= left.size();
        const bool is_first = is_own ? token == 0 && part_->position == 0 : early->place == 0;
        const bool is_wanted =
            is_own && (ubatch_->wanted[static_cast<size_t>(part_->first) + token] || work_->keeps_own);
        // Dropped tokens in front of a short question are not a part of it.
        const bool is_of_prompt = is_own || early->is_deferred;
        is_protected[i] = is_first || is_wanted || (is_of_prompt && (is_last || left[i] >= end));
    }
    return is_protected;
}

/// Indices (ascending) of the tokens that leave, among those that are left.
std::vector<int32_t> part_run::find_leaving(const run_input &in, const prune_cut &cut, const std::vector<int32_t> &left,
                                            const std::vector<float> &importance,
                                            const std::vector<uint8_t> &is_protected) const {
    const drop_rule &rule = cut.stage.rule;
    if (!rule.by_share) return choose_below(importance, is_protected, rule.value);
    if (cut.stage.revive == 0) return choose_least(importance, is_protected, count_of_share(rule.value, left.size()));
    // A share is one of the prompt. What an earlier question has dropped is ranked by itself.
    std::vector<uint8_t> returns(left.size(), 0);
    for (size_t i = 0; i < early_alive_.size(); ++i) {
        returns[i] = !work_->tokens.missing[static_cast<size_t>(early_alive_[i])].is_deferred;
    }
    const size_t n_returning = static_cast<size_t>(std::count(returns.begin(), returns.end(), 1));
    const auto protect = [&](uint8_t those) {
        std::vector<uint8_t> stays(is_protected);
        for (size_t i = 0; i < stays.size(); ++i) stays[i] = stays[i] || returns[i] == those;
        return stays;
    };
    const std::vector<int32_t> of_prompt =
        choose_least(importance, protect(1), count_of_share(rule.value, left.size() - n_returning));
    const auto &missing = work_->tokens.missing;
    const auto waited = [](const early_token &token) { return token.is_deferred; };
    const size_t n_waited = static_cast<size_t>(std::count_if(missing.begin(), missing.end(), waited));
    const size_t most = count_of_share(cut.stage.revive, work_->tokens.cells.size() - n_waited);
    size_t n_lost = n_returning - std::min(most, n_returning);
    // Only the last cut brings their number down to what was asked for; before it, they leave as others do.
    if (&cut != &in.plan.cuts.back()) n_lost = std::min(n_lost, count_of_share(rule.value, n_returning));
    std::vector<int32_t> leaving = choose_least(importance, protect(0), n_lost);
    leaving.insert(leaving.end(), of_prompt.begin(), of_prompt.end());
    std::sort(leaving.begin(), leaving.end());
    return leaving;
}

void part_run::choose(const run_input &in, const prune_cut &cut) {
    const std::vector<int32_t> left = places();
    const std::vector<uint8_t> is_protected = find_protected(cut, left);
    const std::vector<float> importance = measured(in, cut, left, is_protected);
    std::vector<float> &seen = importance_[cut.stage.layer];
    seen.assign(layer_of_early_.size() + layer_of_token_.size(), NAN);
    for (size_t i = 0; i < left.size(); ++i) {
        const bool stays = is_protected[i] || std::isnan(importance[i]);
        seen[static_cast<size_t>(left[i])] = stays ? INFINITY : importance[i];
    }
    const std::vector<int32_t> dropped = find_leaving(in, cut, left, importance, is_protected);
    std::vector<int32_t> still, early_still;
    size_t next = 0;
    for (size_t i = 0; i < left.size(); ++i) {
        const bool is_early = i < early_alive_.size(),
                   leaves = next < dropped.size() && static_cast<size_t>(dropped[next]) == i;
        const int32_t token = is_early ? early_alive_[i] : alive_[i - early_alive_.size()];
        if (leaves) {
            ++next;
            const size_t place = static_cast<size_t>(is_early ? token : token - static_cast<int32_t>(part_->first));
            (is_early ? layer_of_early_ : layer_of_token_)[place] = cut.stage.layer;
        } else {
            (is_early ? early_still : still).push_back(token);
        }
    }
    early_before_.push_back(std::move(early_alive_));
    early_alive_ = std::move(early_still);
    alive_.swap(still);
}

}  // namespace agq
