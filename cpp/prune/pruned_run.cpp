#include "prune/pruned_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "graph/mask_view.h"
#include "host/tensor_rows.h"
#include "scores/selection.h"

namespace agq {

namespace {

/// The size of a token's queries in all measured attentions before that with index `end`.
size_t query_floats(const graph_facts &facts, const prune_plan &plan, int end) {
    int64_t floats = 0;
    for (const head_site &p : plan.probes) {
        const ggml_tensor *q = facts.sites[static_cast<size_t>(p.site)].q;
        if (p.site < end) floats += q->ne[0] * q->ne[2];
    }
    return static_cast<size_t>(floats);
}

}  // namespace

struct pruned_run::call {
    const graph_facts &facts;
    const prune_plan &plan;
    const hidden_cells &hidden;
    bool mask_only;
    const ubatch_facts &ubatch;
    const early_work &early;
    bool defers;
    int n_threads;
    const segment_fn &compute;

    size_t n_early() const { return early.tokens.missing.size(); }
    ggml_backend_buffer *buffer() const { return facts.tensors[0]->buffer; }
};

ggml_status pruned_run::run(const graph_facts &facts, const prune_plan &plan, const hidden_cells &hidden,
                            bool mask_only, const ubatch_facts &ubatch, const key_choices &whole,
                            const early_work &early, int n_threads, const segment_fn &compute) {
    const call c{facts, plan, hidden, mask_only, ubatch, early, false, n_threads, compute};
    begin(c);
    choices_ = whole;
    if (early.graph) early.graph->begin(early.tokens);
    for (size_t segment = 0; segment <= plan.cuts.size(); ++segment) {
        if (early.graph && segment > 0) {
            const ggml_status status = early.graph->run(segment, early_alive_, hidden, c.buffer(), compute);
            if (status != status_success) return status;
        }
        const ggml_status status = run_segment(c, segment);
        if (status != status_success) return status;
        if (segment == plan.cuts.size()) break;
        choose(c, plan.cuts[segment]);
        apply_cut(c, plan.cuts[segment]);
    }
    if (plan.last_states >= 0) spread_last_states(c);
    return status_success;
}

/// Moves the last layer's states to the places of their tokens, where the host may read them. Those of dropped tokens
/// become zeros.
void pruned_run::spread_last_states(const call &c) const {
    const ggml_tensor *states = c.facts.tensors[static_cast<size_t>(c.plan.last_states)];
    char *data = static_cast<char *>(states->data);
    const size_t bytes = states->nb[1];
    for (size_t next = alive_.size(), token = layer_of_token_.size(); rows_ < c.plan.tokens && token-- > 0;) {
        const bool stays = next > 0 && static_cast<size_t>(alive_[next - 1]) == token;
        if (stays) {
            --next;
            if (next != token) std::memcpy(data + token * bytes, data + next * bytes, bytes);
        } else {
            std::memset(data + token * bytes, 0, bytes);
        }
    }
}

ggml_status pruned_run::defer(const graph_facts &facts, const prune_plan &plan, const hidden_cells &hidden,
                              const ubatch_facts &ubatch, const key_choices &whole, const early_work &early,
                              const segment_fn &compute) {
    const call c{facts, plan, hidden, false, ubatch, early, true, 1, compute};
    begin(c);
    choices_ = whole;
    return run_segment(c, 0);
}

void pruned_run::begin(const call &c) {
    arena_.clear();
    lists_.clear();
    spared_.clear();
    job_ = {};
    first_nodes_.clear();
    rows_ = c.plan.tokens;
    copy_.begin(&c.facts, &c.plan.dims, c.plan.tokens, &arena_);
    alive_.resize(static_cast<size_t>(c.plan.tokens));
    for (size_t t = 0; t < alive_.size(); ++t) alive_[t] = static_cast<int32_t>(t);
    early_alive_.resize(c.n_early());
    for (size_t i = 0; i < early_alive_.size(); ++i) early_alive_[i] = static_cast<int32_t>(i);
    layer_of_early_.assign(early_alive_.size(), -1);
    gone_.clear();
    layer_of_token_.assign(alive_.size(), -1);
    seen_importance_.clear();
    head_weights_.clear();
}

/// Adds what the store gets at the end of the first segment.
void pruned_run::add_record(const call &c, cut_job *job) const {
    if (c.early.record) pack_tokens(*c.early.record, copy_, rows_, c.early.records, false, job);
    if (!c.defers) return;
    const size_t first = static_cast<size_t>(c.plan.cuts[0].site) + 1;
    for (size_t s = first; s < c.facts.sites.size(); ++s) {
        const key_rows rows = key_rows::of(c.facts.sites[s].cache);
        const std::vector<char> *mark = s == first ? &c.early.mark : nullptr;
        for (int32_t cell : c.ubatch.kinds[0].cells) {
            job->clears.push_back({const_cast<char *>(rows.row(cell, 0)), rows.row_bytes, mark});
        }
    }
}

/// The tokens that are left: candidates of earlier ubatches, then, after all candidates, those of this one.
std::vector<int32_t> pruned_run::places() const {
    std::vector<int32_t> found(early_alive_);
    const int32_t n_early = static_cast<int32_t>(layer_of_early_.size());
    for (int32_t token : alive_) found.push_back(n_early + token);
    return found;
}

/// The mask of an attention in this segment: for the tokens in the graph, with dropped tokens hidden.
ggml_tensor *pruned_run::mask_of(const call &c, int site) {
    const int level = c.hidden.level(site);
    ggml_tensor *&made = masks_[static_cast<size_t>(level)];
    if (!made) {
        const bool as_it_is = c.hidden.cells(level).empty() && gone_.empty() && rows_ == c.plan.tokens;
        const ggml_tensor *original = c.facts.sites[static_cast<size_t>(site)].mask;
        made = as_it_is ? const_cast<ggml_tensor *>(original) : make_mask(c, level);
    }
    return made;
}

/// The cells that the tokens which are left see in a kind of attention, except those in `hidden`.
std::vector<int32_t> pruned_run::visible_cells(const call &c, int kind, const std::vector<int32_t> &hidden) const {
    const ggml_tensor *mask = c.facts.kinds[static_cast<size_t>(kind)].mask;
    const size_t n = static_cast<size_t>(mask->ne[0]);
    std::vector<uint8_t> seen(n, 0);
    if (c.ubatch.kinds[static_cast<size_t>(kind)].has_window) {
        for (int32_t token : alive_) mask_row(mask, token, 0).mark_visible(mask->ne[0], seen.data());
    } else {
        mask_row(mask, c.plan.tokens - 1, 0).mark_visible(mask->ne[0], seen.data());  // no token sees more
    }
    for (int32_t cell : hidden) seen[static_cast<size_t>(cell)] = 0;
    std::vector<int32_t> cells;
    for (size_t cell = 0; cell < n; ++cell) {
        if (seen[cell]) cells.push_back(static_cast<int32_t>(cell));
    }
    return cells;
}

ggml_tensor *pruned_run::make_mask(const call &c, int level) {
    const int kind = c.hidden.kind(level);
    const ggml_tensor *original = c.facts.kinds[static_cast<size_t>(kind)].mask;
    const ubatch_cells &own = c.ubatch.kinds[static_cast<size_t>(kind)];
    std::vector<int32_t> &hide = lists_.emplace_back();
    for (int32_t token : gone_) hide.push_back(own.cells[static_cast<size_t>(token)]);
    if (!c.hidden.cells(level).empty()) {
        std::vector<int32_t> computed;
        computed.reserve(early_alive_.size());
        for (int32_t i : early_alive_) computed.push_back(c.early.tokens.missing[static_cast<size_t>(i)].cell);
        std::sort(computed.begin(), computed.end());
        for (const dropped_cell &d : c.hidden.cells(level)) {
            if (!std::binary_search(computed.begin(), computed.end(), d.cell)) hide.push_back(d.cell);
        }
    }
    ggml_tensor *made = copy_.with_tokens(c.facts.number(original), rows_);
    cut_job::mask m = {};
    m.from = static_cast<const char *>(original->data);
    m.to = static_cast<char *>(made->data);
    m.from_stride = original->nb[1];
    m.to_stride = made->nb[1];
    m.n_rows = rows_;
    m.n_columns = original->ne[0];
    m.is_f16 = original->type == ggml_type_f16;
    m.rows = c.mask_only ? nullptr : &lists_.emplace_back(alive_);
    m.hidden = &hide;
    if (c.mask_only && own.has_window) {
        // A dropped token goes on with what it sees by the host's mask. Otherwise it might see nothing in its window,
        // and the soft-max of nothing is not a number.
        m.spared = &spared_.emplace_back(static_cast<size_t>(rows_), uint8_t{0});
        for (int32_t token : gone_) spared_.back()[static_cast<size_t>(token)] = 1;
    }
    job_.masks.push_back(m);

    // The same for our own attention, which skips the keys that no token sees.
    std::vector<int32_t> &cells = lists_.emplace_back(visible_cells(c, kind, hide));
    key_group &choice = choices_[made].emplace_back();
    choice.n_tokens = rows_;
    choice.cells = cells.data();
    choice.n = static_cast<int64_t>(cells.size());
    choice.mask_stride = cells.size() * original->nb[0];
    char *memory = arena_.memory(choice.mask_stride * static_cast<size_t>(rows_));
    choice.mask = memory;
    m.to = memory;
    m.to_stride = choice.mask_stride;
    m.hidden = nullptr;
    m.columns = &cells;
    job_.masks.push_back(m);
    return made;
}

score_meter &pruned_run::meter_of(const prune_cut &cut) {
    std::unique_ptr<score_meter> &meter = meters_[cut.stage.measure];
    if (!meter) meter = cut.stage.measure->make_meter(kern_);
    return *meter;
}

void pruned_run::prepare_meter(const call &c, const prune_cut &cut) {
    score_source source;
    source.layer = cut.stage.layer;
    if (cut.state >= 0) source.state = copy_.current(cut.state);
    source.direction = cut.stage.direction;
    prepare(c, cut.stage.measure->input == score_input::attention ? cut.site : -1, source, &meter_of(cut));
}

/// Prepares to measure the tokens that are left; at the attention `site`, if it is not -1.
void pruned_run::prepare(const call &c, int site, score_source source, score_meter *measures) {
    score_meter &meter = *measures;
    if (site >= 0) {
        // The queries are this segment's copy; the keys are in the cache.
        source.site = c.facts.sites[static_cast<size_t>(site)];
        source.site.q = copy_.current(c.facts.number(source.site.q));
        source.site.mask = mask_of(c, site);
    }
    const int kind = site < 0 ? 0 : c.facts.sites[static_cast<size_t>(site)].kind;
    const ubatch_cells &own = c.ubatch.kinds[static_cast<size_t>(kind)];
    meter.tokens.rows.resize(alive_.size());
    meter.tokens.cells.clear();
    for (int32_t i : early_alive_) {
        meter.tokens.cells.push_back(c.early.tokens.missing[static_cast<size_t>(i)].cell);
    }
    meter.tokens.positions.resize(alive_.size());
    for (size_t i = 0; i < alive_.size(); ++i) {
        meter.tokens.rows[i] = c.mask_only ? alive_[i] : static_cast<int32_t>(i);
        meter.tokens.cells.push_back(own.cells[static_cast<size_t>(alive_[i])]);
        meter.tokens.positions[i] = c.ubatch.position + alive_[i];
    }
    meter.tokens.first_cell = own.first_cell;
    if (site >= 0 && c.early.graph) add_observers(c, site, &source, measures);
    meter.prepare(source, c.n_threads);
}

/// If the ubatch has too few tokens to observe the others, the last ones in front of it do so, too.
void pruned_run::add_observers(const call &c, int site, score_source *source, score_meter *meter) {
    const ggml_tensor *q = source->site.q, *mask = source->site.mask;
    const size_t n_own = alive_.size();
    // The attentions up to the first cut have run for these tokens already.
    const size_t offset = query_floats(c.facts, c.plan, site);
    const auto queries_of = [&](size_t back) -> const float * {
        const early_token &token =
            c.early.tokens.missing[static_cast<size_t>(early_alive_[early_alive_.size() - 1 - back])];
        if (site > c.plan.cuts[0].site) return c.early.graph->queries(site, back);
        return token.queries ? token.queries + offset : nullptr;
    };
    size_t n_more = 0;
    while (n_own + n_more < observing_tokens && n_more < early_alive_.size() && queries_of(n_more)) ++n_more;
    if (n_more == 0) return;
    const int64_t rows = static_cast<int64_t>(n_more + n_own), width = q->ne[0], heads = q->ne[2];
    ggml_tensor *all = arena_.copy(q), *seen = arena_.copy(mask);
    all->ne[1] = seen->ne[1] = rows;
    make_contiguous(all);
    make_contiguous(seen);
    all->data = arena_.memory(host.ggml_nbytes(all));
    seen->data = arena_.memory(host.ggml_nbytes(seen));
    cut_job &job = observers_.emplace_back();
    // What earlier tokens see follows from positions; cells of this ubatch come later.
    std::vector<int32_t> &cells = lists_.emplace_back(), &counts = lists_.emplace_back(), &own = lists_.emplace_back();
    std::vector<int32_t> order = c.early.graph->order_of(c.hidden, c.hidden.level(site), early_alive_);
    for (int32_t i : order) cells.push_back(c.early.tokens.cells[static_cast<size_t>(i)]);
    for (size_t row = 0; row < n_more; ++row) {
        const size_t back = n_more - 1 - row;
        const int32_t token = early_alive_[early_alive_.size() - 1 - back];
        const int32_t place = c.early.tokens.missing[static_cast<size_t>(token)].place;
        counts.push_back(static_cast<int32_t>(std::upper_bound(order.begin(), order.end(), place) - order.begin()));
        for (int64_t h = 0; h < heads; ++h) {
            std::memcpy(row_address(all, static_cast<int64_t>(row), h, 0), queries_of(back) + h * width,
                        sizeof(float) * static_cast<size_t>(width));
        }
    }
    const bool is_f16 = mask->type == ggml_type_f16;
    job.ordered_masks.push_back(
        {static_cast<char *>(seen->data), seen->nb[1], mask->ne[0], is_f16, false, &cells, &counts});
    char *own_rows = static_cast<char *>(seen->data) + n_more * seen->nb[1];
    for (size_t i = 0; i < n_own; ++i) own.push_back(meter->tokens.rows[i]);
    job.masks.push_back({static_cast<const char *>(mask->data), own_rows, mask->nb[1], seen->nb[1],
                         static_cast<int64_t>(n_own), mask->ne[0], is_f16, &own, nullptr, nullptr});
    job.observers.push_back({q, static_cast<float *>(all->data) + static_cast<int64_t>(n_more) * width, 0,
                             static_cast<int64_t>(n_own), width, width * rows});
    nodes_.push_back(arena_.custom(cut_node, &job, c.buffer()));
    source->site.q = all;
    source->site.mask = seen;
    meter->tokens.rows.resize(static_cast<size_t>(rows));
    for (size_t i = 0; i < meter->tokens.rows.size(); ++i) meter->tokens.rows[i] = static_cast<int32_t>(i);
}

/// Stores the queries of the ubatch's last tokens, before the attention uses their memory again.
void pruned_run::keep_queries(const call &c, int site) {
    const ggml_tensor *q = copy_.current(c.facts.number(c.facts.sites[static_cast<size_t>(site)].q));
    const size_t n = std::min<size_t>(static_cast<size_t>(c.plan.tokens), observing_tokens);
    token_block &block = *c.early.block;
    const size_t offset = query_floats(c.facts, c.plan, site);
    const size_t all = query_floats(c.facts, c.plan, c.plan.cuts[0].site + 1);
    block.query_floats = all;
    block.queries.resize(n * all);
    observers_.emplace_back().observers.push_back({q, block.queries.data() + offset,
                                                   c.plan.tokens - static_cast<int64_t>(n), static_cast<int64_t>(n),
                                                   static_cast<int64_t>(all), q->ne[0]});
    nodes_.push_back(arena_.custom(cut_node, &observers_.back(), c.buffer()));
}

ggml_status pruned_run::run_segment(const call &c, size_t segment) {
    const auto &cuts = c.plan.cuts;
    const bool is_last = segment == cuts.size();
    const int begin = segment == 0 ? 0 : cuts[segment - 1].at + 1;
    const int end = is_last ? c.facts.n_nodes : cuts[segment].at + 1;
    masks_.assign(static_cast<size_t>(c.hidden.levels()), nullptr);
    nodes_.clear();
    nodes_.push_back(nullptr);  // reserved for the node that makes the copies
    nodes_.insert(nodes_.end(), first_nodes_.begin(), first_nodes_.end());
    first_nodes_.clear();
    const score_input input = is_last ? score_input::position : cuts[segment].stage.measure->input;
    const auto measure = [&] {
        prepare_meter(c, cuts[segment]);
        nodes_.push_back(arena_.custom(measure_node, &meter_of(cuts[segment]), c.buffer()));
    };
    const auto first_node = [&](const head_site &p) { return c.facts.sites[static_cast<size_t>(p.site)].first; };
    probed_now_.clear();
    observers_.clear();
    for (const head_site &p : c.plan.probes) {
        if (first_node(p) >= begin && first_node(p) < end) probed_now_.push_back(&p);
    }
    size_t site = 0, probe = 0;
    while (site < c.facts.sites.size() && c.facts.sites[site].masked < begin) ++site;
    for (int i = begin; i < end; ++i) {
        if (input == score_input::attention && c.facts.sites[static_cast<size_t>(cuts[segment].site)].first == i) {
            measure();
        }
        if (probe < probed_now_.size() && first_node(*probed_now_[probe]) == i) {
            const head_site &p = *probed_now_[probe++];
            if (c.defers) {
                keep_queries(c, p.site);
            } else {
                head_probe &meter = probes_.try_emplace(p.site, kern_).first->second;
                meter.heads = p.heads;
                prepare(c, p.site, {}, &meter);
                nodes_.push_back(arena_.custom(measure_node, static_cast<score_meter *>(&meter), c.buffer()));
            }
        }
        ggml_tensor *mask = nullptr;
        int slot = 0;
        if (site < c.facts.sites.size() && c.facts.sites[site].masked == i) {
            slot = c.facts.sites[site].mask_slot;
            mask = mask_of(c, static_cast<int>(site));
            if (mask == c.facts.sites[site].mask) mask = nullptr;
            ++site;
        }
        nodes_.push_back(copy_.node(i, rows_, mask, slot));
    }
    if (input == score_input::state) measure();
    cut_job record;
    if (segment == 0) add_record(c, &record);
    if (!record.empty()) nodes_.push_back(arena_.custom(cut_node, &record, c.buffer()));
    // With mask_only, keys of dropped tokens are computed, and cleared once the graph no longer needs them.
    ggml_tensor *copies = job_.empty() ? nullptr : arena_.custom(cut_node, &job_, c.buffer());
    cut_job clears;
    if (c.mask_only && !job_.clears.empty()) {
        clears.clears.swap(job_.clears);
        if (is_last) {
            nodes_.push_back(arena_.custom(cut_node, &clears, c.buffer()));
        }
    }
    nodes_[0] = copies;
    const size_t skip = copies ? 0 : 1;
    const ggml_status status = c.compute(nodes_.data() + skip, static_cast<int>(nodes_.size() - skip), choices_);
    if (!c.defers) keep_head_weights(c);
    job_ = {};
    if (c.mask_only && !is_last) job_.clears.swap(clears.clears);
    return status;
}

/// Stores what the probes of a segment have measured, by the tokens of the ubatch.
void pruned_run::keep_head_weights(const call &c) {
    const std::vector<int32_t> left = places();
    for (const head_site *p : probed_now_) {
        const head_probe &meter = probes_.at(p->site);
        for (size_t h = 0; h < p->heads.size(); ++h) {
            std::vector<float> &weights =
                head_weights_[{c.facts.sites[static_cast<size_t>(p->site)].layer, p->heads[h]}];
            weights.assign(layer_of_early_.size() + layer_of_token_.size(), NAN);
            const std::vector<float> largest = meter.largest(h);
            for (size_t i = 0; i < left.size(); ++i) weights[static_cast<size_t>(left[i])] = largest[i];
        }
    }
}

/// The importance of each token that is left.
std::vector<float> pruned_run::measured(const call &c, const prune_cut &cut, const std::vector<uint8_t> &is_protected) {
    if (cut.stage.measure->input != score_input::heads) {
        if (cut.stage.measure->input == score_input::position) prepare_meter(c, cut);
        return spread(meter_of(cut).result(), cut.stage.reach);
    }
    std::vector<std::vector<float>> measures;
    std::vector<int> reach;
    const std::vector<int32_t> left = places();
    const auto add = [&](const std::vector<float> &by_token, int its_reach) {
        std::vector<float> &values = measures.emplace_back(left.size());
        for (size_t i = 0; i < left.size(); ++i) values[i] = by_token[static_cast<size_t>(left[i])];
        reach.push_back(its_reach);
    };
    for (const attention_head &head : cut.heads) add(head_weights_.at(head), cut.stage.reach);
    if (cut.stage.heads.tail != head_choice::no_overlap) {
        std::vector<int32_t> ids;
        ids.reserve(c.early.tokens.missing.size() + c.ubatch.ids.size());
        for (const early_token &token : c.early.tokens.missing) ids.push_back(token.id);
        ids.insert(ids.end(), c.ubatch.ids.begin(), c.ubatch.ids.end());
        add(word_overlap(ids, cut.stage.heads.tail), 0);
    }
    std::vector<uint8_t> is_candidate(is_protected);
    for (uint8_t &is : is_candidate) is = !is;
    return mean_share(measures, reach, is_candidate, static_cast<int64_t>(c.n_early()) + c.plan.tokens);
}

void pruned_run::choose(const call &c, const prune_cut &cut) {
    const std::vector<int32_t> left = places();
    const int64_t n_early = static_cast<int64_t>(c.n_early()), end = n_early + c.plan.tokens - cut.stage.keep;
    std::vector<uint8_t> is_protected(left.size(), 0);
    for (size_t i = 0; i < left.size(); ++i) {
        const bool is_own = left[i] >= n_early;
        const size_t token = static_cast<size_t>(is_own ? left[i] - n_early : left[i]);
        const early_token *early = is_own ? nullptr : &c.early.tokens.missing[token];
        const bool is_last = i + static_cast<size_t>(cut.stage.measure->protected_last) >= left.size();
        const bool is_first = is_own ? token == 0 && c.ubatch.position == 0 : early->place == 0;
        const bool is_wanted = is_own && (c.ubatch.wanted[token] || c.early.keeps_own);
        // Dropped tokens in front of a short question are not a part of it.
        const bool is_of_prompt = is_own || early->is_deferred;
        is_protected[i] = is_first || is_wanted || (is_of_prompt && (is_last || left[i] >= end));
    }
    const std::vector<float> importance = measured(c, cut, is_protected);
    std::vector<float> &seen = seen_importance_[cut.stage.layer];
    seen.assign(layer_of_early_.size() + layer_of_token_.size(), NAN);
    for (size_t i = 0; i < left.size(); ++i) {
        const bool stays = is_protected[i] || std::isnan(importance[i]);
        seen[static_cast<size_t>(left[i])] = stays ? INFINITY : importance[i];
    }
    const std::vector<int32_t> dropped = choose_dropped(cut.stage.rule, importance, is_protected);
    std::vector<int32_t> still, early_still;
    kept_.clear();
    left_.clear();
    gone_now_.clear();
    size_t next = 0;
    for (size_t i = 0; i < early_alive_.size(); ++i) {
        if (next < dropped.size() && static_cast<size_t>(dropped[next]) == i) {
            ++next;
            layer_of_early_[static_cast<size_t>(early_alive_[i])] = cut.stage.layer;
        } else {
            early_still.push_back(early_alive_[i]);
        }
    }
    const size_t first_own = early_alive_.size();
    early_alive_.swap(early_still);
    for (size_t i = 0; i < alive_.size(); ++i) {
        if (next < dropped.size() && static_cast<size_t>(dropped[next]) == first_own + i) {
            ++next;
            layer_of_token_[static_cast<size_t>(alive_[i])] = cut.stage.layer;
            left_.push_back(static_cast<int32_t>(i));
            gone_now_.push_back(alive_[i]);
        } else {
            kept_.push_back(static_cast<int32_t>(i));
            still.push_back(alive_[i]);
        }
    }
    if (!cut.stage.reuse) gone_.insert(gone_.end(), gone_now_.begin(), gone_now_.end());
    alive_.swap(still);
}

void pruned_run::add_clears(const call &c, const prune_cut &cut) {
    for (size_t s = static_cast<size_t>(cut.site) + 1; s < c.facts.sites.size(); ++s) {
        const key_rows rows = key_rows::of(c.facts.sites[s].cache);
        const std::vector<int32_t> &cells = c.ubatch.kinds[static_cast<size_t>(c.facts.sites[s].kind)].cells;
        for (int32_t token : gone_now_) {
            const char *row = rows.row(cells[static_cast<size_t>(token)], 0);
            job_.clears.push_back({const_cast<char *>(row), rows.row_bytes});
        }
    }
}

/// Prepares the copies for the segment after the cut.
void pruned_run::apply_cut(const call &c, const prune_cut &cut) {
    if (&cut == &c.plan.cuts[0]) {
        // Candidates that a question did not choose are no longer deferred, but dropped.
        const key_rows rows = key_rows::of(c.facts.sites[static_cast<size_t>(cut.site) + 1].cache);
        for (size_t i = 0; i < c.n_early(); ++i) {
            const early_token &token = c.early.tokens.missing[i];
            if (!token.is_deferred || layer_of_early_[i] < 0) continue;
            job_.clears.push_back({const_cast<char *>(rows.row(token.cell, 0)), rows.row_bytes});
        }
    }
    if (gone_now_.empty()) return;
    if (cut.stage.reuse) {
        states_.begin(&c.facts, &c.plan.dims, c.plan.tokens, &arena_);
        copy_states(cut.states, copy_, rows_, lists_.emplace_back(left_), &states_, &arena_, &job_, &first_nodes_);
    } else {
        add_clears(c, cut);
    }
    if (c.mask_only) return;
    const std::vector<int32_t> &kept = lists_.emplace_back(kept_);
    const int64_t rows_before = rows_;
    rows_ = static_cast<int64_t>(kept.size());
    for (int number : cut.crossing) {
        ggml_tensor *to = copy_.with_tokens(number, rows_);
        job_.gathers.push_back(copy_.gather_of(number, copy_.current(number), to, rows_before, &kept));
        copy_.replace(number, to);
    }
    // The tokens whose logits are wanted are renumbered.
    const ggml_tensor *out_ids = c.facts.out_ids;
    ggml_tensor *renumbered = arena_.copy(out_ids);
    renumbered->data = arena_.memory(static_cast<size_t>(out_ids->ne[0]) * sizeof(int32_t));
    for (int64_t i = 0; i < out_ids->ne[0]; ++i) {
        const int32_t token = static_cast<const int32_t *>(out_ids->data)[i];
        const auto at = std::lower_bound(alive_.begin(), alive_.end(), token);
        static_cast<int32_t *>(renumbered->data)[i] = static_cast<int32_t>(at - alive_.begin());
    }
    copy_.replace(c.facts.number(out_ids), renumbered);
}

}  // namespace agq
