#include "prune/hidden_cells.h"

#include <algorithm>

#include "graph/ubatch.h"

namespace agq {

namespace {

void mark_in_flight(const graph_facts &facts, const attention_kind &kind, std::vector<uint8_t> *in_flight) {
    const ggml_tensor *mask = kind.mask;
    in_flight->assign(static_cast<size_t>(mask->ne[0] * mask->ne[3]), 0);
    if (!kind.k_cells) return;
    const attention_site &site = facts.sites[static_cast<size_t>(kind.site)];
    const int64_t offset = cell_offset(site);
    const int64_t stream_cells =
        mask->ne[3] > 1 ? static_cast<int64_t>(site.cache->nb[3] / site.cache->nb[1]) : INT64_MAX;
    const int64_t *indices = static_cast<const int64_t *>(kind.k_cells->data);
    for (int64_t t = 0; t < kind.k_cells->ne[0]; ++t) {
        const int64_t index = indices[t] - offset;
        if (index < 0) continue;
        const int64_t stream = index / stream_cells, cell = index % stream_cells;
        if (stream < mask->ne[3] && cell < mask->ne[0])
            (*in_flight)[static_cast<size_t>(stream * mask->ne[0] + cell)] = 1;
    }
}

}  // namespace

bool hidden_cells::find(const graph_facts &facts) {
    ++calls_;
    level_of_site_.clear();
    for (const attention_site &site : facts.sites) level_of_site_.push_back(site.kind);
    n_levels_ = 0;
    kind_of_level_.clear();
    if (in_flight_.size() < facts.kinds.size()) in_flight_.resize(facts.kinds.size());
    if (last_.size() < facts.kinds.size()) last_.resize(facts.kinds.size());
    while (scanners_.size() < facts.kinds.size()) scanners_.emplace_back();
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        new_level(static_cast<int>(k));
        mark_in_flight(facts, facts.kinds[k], &in_flight_[k]);
    }
    const int n_kinds = n_levels_;
    const auto ascends = [](const attention_site &a, const attention_site &b) { return a.layer >= b.layer; };
    const bool ordered = std::adjacent_find(facts.sites.begin(), facts.sites.end(), ascends) == facts.sites.end();
    const auto is_stored = [](const attention_site &site) { return site.is_stored; };
    const bool all_stored = std::all_of(facts.sites.begin(), facts.sites.end(), is_stored);
    if (facts.complete && ordered) {
        for (int k = 0; k < n_kinds; ++k) find_in_whole(facts, k);
    } else if (!facts.complete || !all_stored) {  // else it is not known which layers share a cache
        find_in_part(facts);
    }
    return n_levels_ > n_kinds;
}

/// A level whose list of cells is still that of the graph before.
std::vector<dropped_cell> &hidden_cells::next_level(int kind) {
    kind_of_level_.push_back(kind);
    if (cells_.size() == static_cast<size_t>(n_levels_)) cells_.emplace_back();
    return cells_[static_cast<size_t>(n_levels_++)];
}

std::vector<dropped_cell> &hidden_cells::new_level(int kind) {
    std::vector<dropped_cell> &fresh = next_level(kind);
    fresh.clear();
    return fresh;
}

void hidden_cells::find_in_whole(const graph_facts &facts, int kind) {
    const size_t k = static_cast<size_t>(kind);
    layers_.clear();
    std::vector<int32_t> sites;  // of this kind
    for (size_t s = 0; s < facts.sites.size(); ++s) {
        if (facts.sites[s].kind != kind || !facts.owns_cache(s)) continue;
        sites.push_back(static_cast<int32_t>(s));
        layers_.push_back(key_rows::of(facts.sites[s].cache));
    }
    if (sites.empty()) return;
    const int32_t least = sites.front() == 0 ? 1 : 0;  // no cut stands in front of the model's first attention
    const std::vector<dropped_cell> &found = scanners_[k].scan(layers_, facts.kinds[k].mask, in_flight_[k], least);
    last_levels &last = last_[k];
    const bool same =
        scanners_[k].is_unchanged() && last.number + 1 == calls_ && last.first == n_levels_ && last.sites == sites;
    last.first = n_levels_;
    last.number = 0;  // until all levels are there
    if (same) {
        for (size_t i = 0; i < last.borders.size(); ++i) next_level(kind);
        use_levels(facts, kind);
        last.number = calls_;
        return;
    }
    last.sites = std::move(sites);
    last.borders.clear();
    for (const dropped_cell &d : found) {
        // There are only as many borders as pruning layers.
        if (!last.borders.empty() && d.first_layer == last.borders.back()) continue;
        if (std::find(last.borders.begin(), last.borders.end(), d.first_layer) == last.borders.end()) {
            last.borders.push_back(d.first_layer);
        }
    }
    std::sort(last.borders.begin(), last.borders.end());
    for (const int32_t border : last.borders) {
        std::vector<dropped_cell> &cells = new_level(kind);
        cells.resize(found.size());
        size_t n = 0;
        for (const dropped_cell &d : found) {
            cells[n] = {d.stream, d.cell, last.sites[static_cast<size_t>(d.first_layer)]};
            n += d.first_layer <= border;
        }
        cells.resize(n);
    }
    use_levels(facts, kind);
    last.number = calls_;
}

/// Gives every attention of a kind its level.
void hidden_cells::use_levels(const graph_facts &facts, int kind) {
    const last_levels &last = last_[static_cast<size_t>(kind)];
    const std::vector<int32_t> &borders = last.borders;
    for (size_t i = 0; i < last.sites.size(); ++i) {
        const auto end = std::upper_bound(borders.begin(), borders.end(), static_cast<int32_t>(i));
        if (end == borders.begin()) continue;
        level_of_site_[static_cast<size_t>(last.sites[i])] = last.first + static_cast<int>(end - borders.begin()) - 1;
    }
    for (size_t s = 0; s < facts.sites.size(); ++s) {
        if (facts.sites[s].kind == kind) level_of_site_[s] = level_of_site_[static_cast<size_t>(facts.sites[s].owner)];
    }
}

/// For a part of a graph, the cells of this ubatch may be outdated: later layers may still hold an earlier token's
/// keys, while earlier layers already hold the new ones. So each layer is scanned on its own.
void hidden_cells::find_in_part(const graph_facts &facts) {
    for (size_t s = 0; s < facts.sites.size(); ++s) {
        const attention_site &site = facts.sites[s];
        const size_t k = static_cast<size_t>(site.kind);
        bool written_here = false;
        for (int i = 0; i < site.first; ++i) {
            const ggml_tensor *node = facts.tensors[static_cast<size_t>(i)];
            written_here = written_here || (node->op == host.op_set_rows && root_of(node) == root_of(site.cache));
        }
        layers_ = {key_rows::of(site.cache)};
        static const std::vector<uint8_t> nothing;
        const std::vector<dropped_cell> &found =
            scanners_[k].scan(layers_, facts.kinds[k].mask, written_here ? in_flight_[k] : nothing, 0);
        if (found.empty()) continue;
        level_of_site_[s] = n_levels_;
        new_level(site.kind) = found;
    }
}

}  // namespace agq
