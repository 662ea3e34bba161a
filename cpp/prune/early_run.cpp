// The part of early_graph that computes tokens.
#include <algorithm>
#include <type_traits>

#include "prune/early_graph.h"

namespace agq {

void early_pass::begin(const early_tokens &tokens) {
    tokens_ = &tokens;
    pools_.clear();
    at_cut_.clear();
    for (const early_token &t : tokens.missing) at_cut_.push_back(const_cast<char *>(t.rows));
}

std::vector<int32_t> early_pass::order_of(const hidden_cells &hidden, int kind, int site,
                                          const std::vector<int32_t> &alive) const {
    const size_t n = tokens_->cells.size();
    std::vector<uint8_t> sees(n, 1);
    if (kind == tokens_->kind) {
        size_t n_cells = 0;
        for (int32_t cell : tokens_->cells) n_cells = std::max(n_cells, static_cast<size_t>(cell) + 1);
        std::vector<uint8_t> hides(n_cells, 0);
        for (const dropped_cell &d : hidden.cells(hidden.level(site))) {
            if (static_cast<size_t>(d.cell) < n_cells) hides[static_cast<size_t>(d.cell)] = 1;
        }
        for (size_t i = 0; i < n; ++i) sees[i] = !hides[static_cast<size_t>(tokens_->cells[i])];
    } else if (site > tokens_->first_cut) {
        const early_window &window = tokens_->windows[static_cast<size_t>(kind)];
        for (size_t i = 0; i < n; ++i) sees[i] = window.end_site[i] > site;
    }
    for (int32_t i : alive) sees[static_cast<size_t>(tokens_->missing[static_cast<size_t>(i)].place)] = 1;
    std::vector<int32_t> order;
    for (size_t i = 0; i < n; ++i) {
        if (sees[i]) order.push_back(static_cast<int32_t>(i));
    }
    return order;
}

const float *early_pass::queries(int site, size_t back) const {
    const auto found = queries_.find(site);
    if (found == queries_.end() || back >= n_queries_) return nullptr;
    return &found->second[(n_queries_ - 1 - back) * (found->second.size() / n_queries_)];
}

ggml_status early_graph::run(size_t segment, early_pass *pass, const std::vector<int32_t> &alive,
                             const hidden_cells &hidden, ggml_backend_buffer *buffer, const segment_fn &compute) {
    if (alive.empty() || needed_[segment].empty()) return status_success;
    pass_ = pass;
    side_.show(pass->tokens_->kind, pass->tokens_->stream);
    for (ggml_tensor &t : tensors_) t.buffer = buffer;
    begin_windows(segment, alive, hidden);
    std::vector<char *> next;
    if (segment < plan_.cuts.size()) {
        const size_t bytes = records_[segment].bytes;
        char *pool = pass->pools_.emplace_back(new char[alive.size() * bytes + 1]).get();
        for (size_t i = 0; i < alive.size(); ++i) next.push_back(pool + i * bytes);
    }
    // The last chunk is as long as it may be, because its last tokens may observe the others.
    std::vector<size_t> ends;
    for (size_t end = alive.size(); end > 0;) {
        ends.push_back(end);
        size_t first = end > static_cast<size_t>(plan_.tokens) ? end - static_cast<size_t>(plan_.tokens) : 0;
        while (first + 1 < end && !fits_windows(alive, first, end)) ++first;
        end = first;
    }
    for (size_t first = 0; !ends.empty(); ends.pop_back()) {
        const auto slice = [&](const auto &all) {
            using list = std::decay_t<decltype(all)>;
            const auto begin = all.begin();
            return all.empty() ? list{}
                               : list(begin + static_cast<std::ptrdiff_t>(first),
                                      begin + static_cast<std::ptrdiff_t>(ends.back()));
        };
        const std::vector<int32_t> chunk = slice(alive);
        load_windows(segment, chunk);
        const ggml_status status = run_chunk(segment, chunk, slice(next), buffer, compute);
        if (status != status_success) return status;
        finish_windows(segment, chunk);
        first = ends.back();
    }
    for (size_t i = 0; i < next.size(); ++i) pass->at_cut_[static_cast<size_t>(alive[i])] = next[i];
    return status_success;
}

ggml_status early_graph::run_chunk(size_t segment, const std::vector<int32_t> &chunk, const std::vector<char *> &next,
                                   ggml_backend_buffer *buffer, const segment_fn &compute) {
    arena_.clear();
    lists_.clear();
    pointers_.clear();
    choices_.clear();
    const int64_t n = static_cast<int64_t>(chunk.size());
    copy_.begin(&facts_, &plan_.dims, plan_.tokens, &arena_);
    cut_job before, after;
    add_inputs(segment, chunk, &before);
    pass_->queries_.clear();
    pass_->n_queries_ = std::min<size_t>(chunk.size(), observing_tokens);
    std::deque<cut_job> observers;
    std::vector<ggml_tensor *> nodes = {nullptr};
    struct made_mask {
        ggml_tensor *mask = nullptr;
        const std::vector<int32_t> *order = nullptr;
    };
    std::vector<made_mask> masks(facts_.kinds.size());  // the latest, which the next attention may take, too
    size_t site = 0;
    for (int i : needed_[segment]) {
        while (site < facts_.sites.size() && facts_.sites[site].masked < i) ++site;
        ggml_tensor *mask = nullptr;
        int slot = 0;
        if (site < facts_.sites.size() && facts_.sites[site].masked == i) {
            const int kind = facts_.sites[site].kind;
            made_mask &made = masks[static_cast<size_t>(kind)];
            if (!made.mask || *made.order != orders_[site]) {
                made = {make_mask(chunk, kind, orders_[site], &before), &orders_[site]};
            }
            mask = made.mask;
            slot = facts_.sites[site].mask_slot;
        }
        for (const head_site &probe : plan_.probes) {
            const attention_site &at = facts_.sites[static_cast<size_t>(probe.site)];
            if (at.first != i) continue;
            const ggml_tensor *q = copy_.current(facts_.number(at.q));
            std::vector<float> &to = pass_->queries_[probe.site];
            const int64_t kept = static_cast<int64_t>(pass_->n_queries_);
            to.resize(static_cast<size_t>(kept * q->ne[0] * q->ne[2]));
            observers.emplace_back().observers.push_back({q, to.data(), n - kept, kept, q->ne[0] * q->ne[2], q->ne[0]});
            nodes.push_back(arena_.custom(cut_node, &observers.back(), buffer));
        }
        nodes.push_back(copy_.node(i, n, mask, slot));
    }
    if (!next.empty()) {
        pack_tokens(records_[segment], copy_, n, pointers_.emplace_back(next), false, &after);
        nodes.push_back(arena_.custom(cut_node, &after, buffer));
    }
    nodes[0] = arena_.custom(cut_node, &before, buffer);
    return compute(nodes.data(), static_cast<int>(nodes.size()), choices_);
}

/// Makes the tensors that cross the cut before the segment.
void early_graph::add_inputs(size_t segment, const std::vector<int32_t> &chunk, cut_job *job) {
    const int64_t n = static_cast<int64_t>(chunk.size());
    const early_tokens &tokens = *pass_->tokens_;
    std::vector<char *> &stored = pointers_.emplace_back(), &at_cut = pointers_.emplace_back();
    std::vector<const std::vector<int32_t> *> cells;  // by kind
    for (size_t k = 0; k < facts_.kinds.size(); ++k) {
        const bool is_aside = static_cast<int>(k) != tokens.kind;
        std::vector<int32_t> &of_kind = lists_.emplace_back();
        cells.push_back(&of_kind);
        for (int32_t i : chunk) {
            const early_token &token = tokens.missing[static_cast<size_t>(i)];
            of_kind.push_back(is_aside ? side_cell(static_cast<int>(k), token.place) : token.cell);
        }
    }
    for (int32_t i : chunk) {
        stored.push_back(const_cast<char *>(tokens.missing[static_cast<size_t>(i)].rows));
        at_cut.push_back(pass_->at_cut_[static_cast<size_t>(i)]);
    }
    const std::vector<int> &crossing = plan_.cuts[segment - 1].crossing;
    for (int number : crossing) {
        ggml_tensor *to = copy_.with_tokens(number, n);
        copy_.replace(number, to);
        const place_input input = place_of(facts_, number);
        const size_t kind = static_cast<size_t>(input.kind);
        const int64_t stream = input.kind == tokens.kind ? tokens.stream : 0;
        // Of a stream.
        const int64_t n_cells = root_of(facts_.sites[static_cast<size_t>(facts_.kinds[kind].site)].cache)->ne[1];
        switch (input.what) {
            case place_input::of::position:
                for (int64_t i = 0; i < to->ne[0]; ++i) {
                    // Tokens of text have 0 in the last section of M-RoPE.
                    const bool is_last_section = i / n == position_sections - 1;
                    const size_t token = static_cast<size_t>(chunk[static_cast<size_t>(i % n)]);
                    static_cast<int32_t *>(to->data)[i] = is_last_section ? 0 : tokens.missing[token].position;
                }
                break;
            case place_input::of::key_cells:
                job->numbers.push_back({static_cast<int64_t *>(to->data), stream * n_cells, 1, 0, cells[kind]});
                break;
            case place_input::of::value_cells: {
                const int64_t each = plan_.dims[static_cast<size_t>(number)].mult;
                job->numbers.push_back(
                    {static_cast<int64_t *>(to->data), stream * n_cells * each, each, n_cells, cells[kind]});
                break;
            }
            case place_input::of::none:
                break;
        }
    }
    const auto crosses = [&](const token_record::part &part) {
        return std::binary_search(crossing.begin(), crossing.end(), part.number);
    };
    token_record inputs, nodes;
    for (const token_record::part &part : records_[0].parts) {
        if (part.number >= facts_.n_nodes && crosses(part)) inputs.parts.push_back(part);
    }
    for (const token_record::part &part : records_[segment - 1].parts) {
        if (part.number < facts_.n_nodes) nodes.parts.push_back(part);
    }
    pack_tokens(inputs, copy_, n, stored, true, job);
    pack_tokens(nodes, copy_, n, at_cut, true, job);
}

/// A mask in which each token of the chunk sees the tokens of `order` up to itself, or those of its window.
ggml_tensor *early_graph::make_mask(const std::vector<int32_t> &chunk, int kind, const std::vector<int32_t> &order,
                                    cut_job *job) {
    const early_tokens &tokens = *pass_->tokens_;
    const ggml_tensor *original = facts_.kinds[static_cast<size_t>(kind)].mask;
    const bool has_window = kind != tokens.kind;
    const int64_t n = static_cast<int64_t>(chunk.size());
    const auto begin = order.begin();
    std::vector<int32_t> &seen = lists_.emplace_back(), &from = lists_.emplace_back();
    for (int32_t i : chunk) {
        const int32_t place = tokens.missing[static_cast<size_t>(i)].place;
        seen.push_back(static_cast<int32_t>(std::upper_bound(begin, order.end(), place) - begin));
        if (!has_window) continue;
        const int32_t first = tokens.windows[static_cast<size_t>(kind)].first[static_cast<size_t>(place)];
        from.push_back(static_cast<int32_t>(std::lower_bound(begin, order.end(), first) - begin));
    }
    // Only those that any token of the chunk sees.
    const int32_t skipped = has_window ? *std::min_element(from.begin(), from.end()) : 0;
    std::vector<int32_t> &cells = lists_.emplace_back();
    for (int32_t i = skipped; i < seen.back(); ++i) {
        const int32_t place = order[static_cast<size_t>(i)];
        cells.push_back(has_window ? side_cell(kind, place) : tokens.cells[static_cast<size_t>(place)]);
    }
    for (int32_t &i : seen) i -= skipped;
    for (int32_t &i : from) i -= skipped;
    ggml_tensor *made = copy_.with_tokens(facts_.number(original), n);
    const bool is_f16 = original->type == ggml_type_f16;
    const std::vector<int32_t> *first = has_window ? &from : nullptr;
    job->ordered_masks.push_back(
        {static_cast<char *>(made->data), made->nb[1], original->ne[0], is_f16, false, &cells, &seen, first});
    // The same for our own attention, which skips the keys that no token sees. It wants ascending cells.
    std::vector<int32_t> &sorted = lists_.emplace_back(cells);
    std::sort(sorted.begin(), sorted.end());
    if (sorted != cells) return made;
    key_group &choice = choices_[made].emplace_back();
    choice.packs = true;
    choice.n_tokens = n;
    choice.cells = sorted.data();
    choice.n = static_cast<int64_t>(sorted.size());
    choice.mask_stride = sorted.size() * original->nb[0];
    char *memory = arena_.memory(choice.mask_stride * static_cast<size_t>(n));
    choice.mask = memory;
    job->ordered_masks.push_back({memory, choice.mask_stride, choice.n, is_f16, true, &sorted, &seen, first});
    return made;
}

}  // namespace agq
