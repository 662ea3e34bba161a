#include "prune/pruned_run.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "graph/mask_view.h"
#include "prune/cell_clears.h"

namespace agq {

ggml_status pruned_run::run(const run_input &in, const key_choices &whole, const segment_fn &compute) {
    begin(in);
    choices_ = whole;
    for (auto &[mask, groups] : choices_) {
        for (key_group &group : groups) {
            const auto is_group = [&](const part_run *part) { return part->part().first == group.first_token; };
            const auto part = std::find_if(parts_.begin(), parts_.end(), is_group);
            group.packs = part != parts_.end() && (*part)->packs();
        }
    }
    const size_t n_cuts = in.plan.cuts.size();
    for (size_t segment = 0; segment <= n_cuts; ++segment) {
        for (part_run *part : parts_) {
            if (segment == 0 || !part->work().has_candidates()) continue;
            const ggml_status status =
                in.work.graph->run(segment, &part->early(), part->early_alive(), in.hidden, to_.buffer, compute);
            if (status != status_success) return status;
        }
        const ggml_status status = run_segment(in, segment, compute);
        if (status != status_success) return status;
        if (segment == n_cuts) break;
        choose(in.plan.cuts[segment], in, segment == 0);
        if (std::all_of(parts_.begin(), parts_.end(), [](const part_run *p) { return p->defers(); })) break;
        apply_cut(in, in.plan.cuts[segment]);
    }
    if (in.plan.last_states >= 0 && !alive_.empty()) spread_last_states(in);
    return status_success;
}

void pruned_run::begin(const run_input &in) {
    to_.begin_run(in.facts.tensors[0]->buffer);
    job_ = {};
    first_nodes_.clear();
    gone_.clear();
    gone_ends_.assign(1, 0);
    rows_ = in.plan.tokens;
    copy_.begin(&in.facts, &in.plan.dims, in.plan.tokens, &to_.arena);
    const size_t n_parts = in.ubatch.parts.size();
    while (all_parts_.size() < n_parts) all_parts_.emplace_back(kern_);
    parts_.clear();
    records_.assign(static_cast<size_t>(rows_), nullptr);
    for (size_t p = 0; p < n_parts; ++p) {
        part_run &part = *parts_.emplace_back(&all_parts_[p]);
        part.begin(in, p);
        const token_block *block = part.work().block.get();
        for (int64_t i = 0; block && block->rows && i < part.part().n; ++i) {
            records_[static_cast<size_t>(part.part().first + i)] =
                block->rows.get() + static_cast<size_t>(i) * block->row_bytes;
        }
    }
    alive_.resize(static_cast<size_t>(rows_));
    std::iota(alive_.begin(), alive_.end(), 0);
}

/// Moves the last layer's states to the places of their tokens, where the host may read them. Those of dropped tokens
/// become zeros.
void pruned_run::spread_last_states(const run_input &in) const {
    const ggml_tensor *states = in.facts.tensors[static_cast<size_t>(in.plan.last_states)];
    char *data = static_cast<char *>(states->data);
    const size_t bytes = states->nb[1];
    for (size_t next = alive_.size(), token = static_cast<size_t>(in.plan.tokens);
         rows_ < in.plan.tokens && token-- > 0;) {
        const bool stays = next > 0 && static_cast<size_t>(alive_[next - 1]) == token;
        if (stays) {
            --next;
            if (next != token) std::memcpy(data + token * bytes, data + next * bytes, bytes);
        } else {
            std::memset(data + token * bytes, 0, bytes);
        }
    }
}

/// Where the rows of a part begin in the graph as it is now.
int64_t pruned_run::first_row(const run_input &in, const part_run &part) const {
    if (in.mask_only) return part.part().first;
    return std::lower_bound(alive_.begin(), alive_.end(), part.part().first) - alive_.begin();
}

int64_t pruned_run::n_rows(const run_input &in, const part_run &part) const {
    return in.mask_only ? part.part().n : static_cast<int64_t>(part.alive().size());
}

/// Adds what the store gets at the end of the first segment.
void pruned_run::add_record(const run_input &in, cut_job *job) {
    const auto is_there = [](const char *record) { return record != nullptr; };
    if (std::any_of(records_.begin(), records_.end(), is_there)) {
        pack_tokens(in.work.record, copy_, rows_, records_, false, job);
    }
    for (const part_run *part : parts_) {
        if (part->defers()) {
            mark_deferred(in.facts, in.ubatch, part->part(), in.plan.cuts[0].site, in.work.mark, job);
        }
    }
}

/// The keys that a part sees with this mask, or null if that is not known.
const key_group *pruned_run::group_of(const run_input &in, const ggml_tensor *mask, const part_run &part) const {
    const auto of_mask = choices_.find(mask);
    if (of_mask == choices_.end()) return nullptr;
    const int64_t first = first_row(in, part), n = n_rows(in, part);
    for (const key_group &group : of_mask->second) {
        if (group.first_token == first && group.n_tokens == n) return &group;
    }
    return nullptr;
}

/// The mask of an attention in this segment: for the tokens in the graph, with dropped tokens hidden.
ggml_tensor *pruned_run::mask_of(const run_input &in, int site) {
    const int level = in.hidden.level(site);
    const size_t cuts = cuts_before_cache(in.plan, in.facts.sites[static_cast<size_t>(site)]);
    ggml_tensor *&made = masks_[{level, cuts}];
    if (!made) {
        const ggml_tensor *original = in.facts.sites[static_cast<size_t>(site)].mask;
        const auto has_group = [&](const part_run *part) { return group_of(in, original, *part) != nullptr; };
        const bool as_it_is = in.hidden.cells(level).empty() && static_cast<int64_t>(alive_.size()) == in.plan.tokens &&
                              std::all_of(parts_.begin(), parts_.end(), has_group);
        made = as_it_is ? const_cast<ggml_tensor *>(original) : make_mask(in, level, cuts);
    }
    return made;
}

/// The cells that the tokens of a part which are left see in a kind of attention, except those in `hidden`.
std::vector<int32_t> pruned_run::visible_cells(const run_input &in, int kind, const part_run &part,
                                               const std::vector<int32_t> &hidden) const {
    const ggml_tensor *mask = in.facts.kinds[static_cast<size_t>(kind)].mask;
    std::vector<uint8_t> seen(static_cast<size_t>(mask->ne[0]), 0);
    const std::vector<sequence_view> &views = part.part().views;
    if (views.empty() || views[static_cast<size_t>(kind)].has_window) {
        for (int32_t token : part.alive()) mask_row(mask, token, 0).mark_visible(0, mask->ne[0], seen.data());
    } else {
        mask_row(mask, part.part().last(), 0).mark_visible(0, mask->ne[0], seen.data());  // no token sees more
    }
    for (int32_t cell : hidden) seen[static_cast<size_t>(cell)] = 0;
    std::vector<int32_t> cells;
    list_marked(seen, &cells);
    return cells;
}

/// The cells that attentions of a level must not see, if so many cuts stand in front of their cache.
std::vector<int32_t> pruned_run::hidden_at(const run_input &in, int level, size_t cuts) const {
    const std::vector<int32_t> &own = in.ubatch.cells[static_cast<size_t>(in.hidden.kind(level))];
    std::vector<int32_t> hide, computed;
    for (size_t i = 0; i < gone_ends_[cuts]; ++i) hide.push_back(own[static_cast<size_t>(gone_[i])]);
    if (in.hidden.cells(level).empty()) return hide;
    for (const part_run *part : parts_) {
        const early_tokens &early = part->work().tokens;
        for (int32_t i : part->early_alive_after(cuts)) {
            computed.push_back(early.cell_of(in.hidden.kind(level), early.missing[static_cast<size_t>(i)].place));
        }
    }
    std::sort(computed.begin(), computed.end());
    for (const dropped_cell &d : in.hidden.cells(level)) {
        if (!std::binary_search(computed.begin(), computed.end(), d.cell)) hide.push_back(d.cell);
    }
    return hide;
}

ggml_tensor *pruned_run::make_mask(const run_input &in, int level, size_t cuts) {
    const int kind = in.hidden.kind(level);
    const ggml_tensor *original = in.facts.kinds[static_cast<size_t>(kind)].mask;
    const std::vector<int32_t> &hide = to_.lists.emplace_back(hidden_at(in, level, cuts));
    ggml_tensor *made = copy_.with_tokens(in.facts.number(original), rows_);
    cut_job::mask m = {};
    m.from = static_cast<const char *>(original->data);
    m.to = static_cast<char *>(made->data);
    m.from_stride = original->nb[1];
    m.to_stride = made->nb[1];
    m.n_rows = rows_;
    m.n_columns = original->ne[0];
    m.is_f16 = original->type == ggml_type_f16;
    m.rows = in.mask_only ? nullptr : &to_.lists.emplace_back(alive_);
    m.hidden = &hide;
    const auto has_window = [kind](const part_run *part) {
        return !part->part().views.empty() && part->part().views[static_cast<size_t>(kind)].has_window;
    };
    if (in.mask_only && std::any_of(parts_.begin(), parts_.end(), has_window)) {
        // A dropped token goes on with what it sees by the host's mask. Otherwise it might see nothing in its window,
        // and the soft-max of nothing is not a number.
        m.spared = &to_.spared.emplace_back(static_cast<size_t>(rows_), uint8_t{0});
        for (int32_t token : gone_) to_.spared.back()[static_cast<size_t>(token)] = 1;
    }
    job_.masks.push_back(m);

    // The same for our own attention, part by part, which skips the keys that no token of the part sees.
    m.hidden = nullptr;
    std::vector<key_group> &groups = choices_[made];
    for (const part_run *part : parts_) {
        const int64_t first = first_row(in, *part), n = n_rows(in, *part);
        if (n == 0) continue;
        const std::vector<int32_t> &cells = to_.lists.emplace_back(visible_cells(in, kind, *part, hide));
        std::vector<int32_t> &rows = to_.lists.emplace_back(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) {
            const size_t row = static_cast<size_t>(first + i);
            rows[static_cast<size_t>(i)] = in.mask_only ? static_cast<int32_t>(row) : alive_[row];
        }
        key_group &choice = groups.emplace_back();
        choice.first_token = first;
        choice.n_tokens = n;
        choice.packs = part->packs();
        choice.cells = cells.data();
        choice.n = static_cast<int64_t>(cells.size());
        choice.mask_stride = cells.size() * original->nb[0];
        char *memory = to_.arena.memory(choice.mask_stride * static_cast<size_t>(n));
        choice.mask = memory;
        m.to = memory;
        m.to_stride = choice.mask_stride;
        m.n_rows = n;
        m.rows = &rows;
        m.columns = &cells;
        job_.masks.push_back(m);
    }
    return made;
}

/// An attention as a part sees it in this segment.
score_source pruned_run::source_of(const run_input &in, int site, const part_run &part) {
    score_source source;
    source.site = in.facts.sites[static_cast<size_t>(site)];
    // The queries are this segment's copy; the keys are in the cache.
    source.site.q = copy_.current(in.facts.number(source.site.q));
    source.site.mask = mask_of(in, site);
    source.keys = *group_of(in, source.site.mask, part);
    return source;
}

/// Adds the nodes that measure the score of a cut.
void pruned_run::add_meters(const run_input &in, const prune_cut &cut) {
    for (part_run *part : parts_) {
        if (!part->chooses()) continue;
        score_source source;
        if (cut.stage.measure->input == score_input::attention) source = source_of(in, cut.site, *part);
        source.layer = cut.stage.layer;
        if (cut.state >= 0) source.state = copy_.current(cut.state);
        source.direction = cut.stage.direction;
        part->add_meter(in, cut, source, first_row(in, *part), &to_);
    }
}

/// Adds the nodes that measure these heads or, for parts that wait, keep what is needed to do so later.
void pruned_run::add_probes(const run_input &in, const head_site &heads) {
    for (part_run *part : parts_) {
        if (part->chooses()) {
            part->add_probe(in, heads, source_of(in, heads.site, *part), first_row(in, *part), &to_);
        } else if (part->defers() && heads.site <= in.plan.cuts[0].site) {
            const ggml_tensor *q = in.facts.sites[static_cast<size_t>(heads.site)].q;
            part->add_store_of_queries(in, heads.site, copy_.current(in.facts.number(q)), &to_);
        }
    }
}

ggml_status pruned_run::run_segment(const run_input &in, size_t segment, const segment_fn &compute) {
    const auto &cuts = in.plan.cuts;
    const bool is_last = segment == cuts.size();
    const int begin = segment == 0 ? 0 : cuts[segment - 1].at + 1;
    const int end = is_last ? in.facts.n_nodes : cuts[segment].at + 1;
    masks_.clear();
    to_.begin_segment();
    std::vector<ggml_tensor *> &nodes = to_.nodes;
    nodes.push_back(nullptr);  // reserved for the node that makes the copies
    nodes.insert(nodes.end(), first_nodes_.begin(), first_nodes_.end());
    first_nodes_.clear();
    const score_input input = is_last ? score_input::position : cuts[segment].stage.measure->input;
    const auto first_node = [&](const head_site &p) { return in.facts.sites[static_cast<size_t>(p.site)].first; };
    std::vector<const head_site *> probed;  // in this segment
    for (const head_site &p : in.plan.probes) {
        if (first_node(p) >= begin && first_node(p) < end) probed.push_back(&p);
    }
    size_t site = 0, probe = 0;
    while (site < in.facts.sites.size() && in.facts.sites[site].masked < begin) ++site;
    for (int i = begin; i < end; ++i) {
        if (input == score_input::attention && in.facts.sites[static_cast<size_t>(cuts[segment].site)].first == i) {
            add_meters(in, cuts[segment]);
        }
        if (probe < probed.size() && first_node(*probed[probe]) == i) add_probes(in, *probed[probe++]);
        ggml_tensor *mask = nullptr;
        int slot = 0;
        if (site < in.facts.sites.size() && in.facts.sites[site].masked == i) {
            slot = in.facts.sites[site].mask_slot;
            mask = mask_of(in, static_cast<int>(site));
            if (mask == in.facts.sites[site].mask) mask = nullptr;
            ++site;
        }
        nodes.push_back(copy_.node(i, rows_, mask, slot));
    }
    if (input == score_input::state) add_meters(in, cuts[segment]);
    cut_job record;
    if (segment == 0) add_record(in, &record);
    if (!record.empty()) to_.add(cut_node, &record);
    // With mask_only, keys of dropped tokens are computed, and cleared once the graph no longer needs them.
    ggml_tensor *copies = job_.empty() ? nullptr : to_.arena.custom(cut_node, &job_, to_.buffer);
    cut_job clears;
    if (in.mask_only && !job_.clears.empty()) {
        clears.clears.swap(job_.clears);
        if (is_last) to_.add(cut_node, &clears);
    }
    nodes[0] = copies;
    const size_t skip = copies ? 0 : 1;
    const ggml_status status = compute(nodes.data() + skip, static_cast<int>(nodes.size() - skip), choices_);
    for (part_run *part : parts_) {
        for (const head_site *p : probed) {
            if (part->chooses()) part->keep_weights(in, *p);
        }
    }
    job_ = {};
    if (in.mask_only && !is_last) job_.clears.swap(clears.clears);
    return status;
}

/// Lets the parts choose the tokens that leave at a cut.
void pruned_run::choose(const prune_cut &cut, const run_input &in, bool is_first) {
    std::vector<int32_t> still;
    std::vector<uint8_t> waits(static_cast<size_t>(in.plan.tokens), 0);
    for (part_run *part : parts_) {
        if (part->chooses()) part->choose(in, cut);
        if (part->defers() && is_first) {
            for (int32_t token : part->alive()) waits[static_cast<size_t>(token)] = 1;
            part->leave();
        }
        still.insert(still.end(), part->alive().begin(), part->alive().end());
    }
    kept_.clear();
    left_.clear();
    gone_now_.clear();
    size_t next = 0;
    for (size_t i = 0; i < alive_.size(); ++i) {
        const int32_t token = alive_[i];
        if (next < still.size() && still[next] == token) {
            ++next;
            kept_.push_back(static_cast<int32_t>(i));
        } else if (!waits[static_cast<size_t>(token)]) {
            left_.push_back(static_cast<int32_t>(i));
            gone_now_.push_back(token);
        }
    }
    if (!cut.stage.reuse) gone_.insert(gone_.end(), gone_now_.begin(), gone_now_.end());
    gone_ends_.push_back(gone_.size());
    alive_.swap(still);
}

/// Prepares the copies for the segment after the cut.
void pruned_run::apply_cut(const run_input &in, const prune_cut &cut) {
    for (const part_run *part : parts_) {
        const early_tokens &early = part->work().tokens;
        if (!early.missing.empty()) unmark_dropped(in.facts, early, cut.site, part->layer_of_early(), &job_);
    }
    if (cut.stage.reuse && !gone_now_.empty()) {
        states_.begin(&in.facts, &in.plan.dims, in.plan.tokens, &to_.arena);
        copy_states(cut.states, copy_, rows_, to_.lists.emplace_back(left_), &states_, &to_.arena, &job_,
                    &first_nodes_);
    } else {
        clear_dropped(in.facts, in.ubatch, cut.site, gone_now_, &job_);
    }
    if (in.mask_only || static_cast<int64_t>(kept_.size()) == rows_) return;
    const std::vector<int32_t> &kept = to_.lists.emplace_back(kept_);
    const int64_t rows_before = rows_;
    rows_ = static_cast<int64_t>(kept.size());
    for (int number : cut.crossing) {
        ggml_tensor *to = copy_.with_tokens(number, rows_);
        job_.gathers.push_back(copy_.gather_of(number, copy_.current(number), to, rows_before, &kept));
        copy_.replace(number, to);
    }
    // The tokens whose logits are wanted are renumbered.
    const ggml_tensor *out_ids = in.facts.out_ids;
    ggml_tensor *renumbered = to_.arena.copy(out_ids);
    renumbered->data = to_.arena.memory(static_cast<size_t>(out_ids->ne[0]) * sizeof(int32_t));
    for (int64_t i = 0; i < out_ids->ne[0]; ++i) {
        const int32_t token = static_cast<const int32_t *>(out_ids->data)[i];
        const auto at = std::lower_bound(alive_.begin(), alive_.end(), token);
        static_cast<int32_t *>(renumbered->data)[i] = static_cast<int32_t>(at - alive_.begin());
    }
    copy_.replace(in.facts.number(out_ids), renumbered);
}

}  // namespace agq
