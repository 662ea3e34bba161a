#include "prune/hidden_cells.h"

#include <algorithm>

#include "graph/ubatch.h"

namespace agq {

bool hidden_cells::find(const graph_facts &facts) {
    level_of_site_.assign(facts.sites.size(), 0);
    n_levels_ = 1;
    if (cells_.empty()) cells_.resize(1);
    mark_in_flight(facts);
    const auto ascends = [](const attention_site &a, const attention_site &b) { return a.layer >= b.layer; };
    const bool ordered = std::adjacent_find(facts.sites.begin(), facts.sites.end(), ascends) == facts.sites.end();
    if (facts.complete && ordered) {
        find_in_whole(facts);
    } else {
        find_in_part(facts);
    }
    return n_levels_ > 1;
}

std::vector<dropped_cell> &hidden_cells::new_level() {
    if (cells_.size() == static_cast<size_t>(n_levels_)) cells_.emplace_back();
    std::vector<dropped_cell> &fresh = cells_[static_cast<size_t>(n_levels_++)];
    fresh.clear();
    return fresh;
}

void hidden_cells::mark_in_flight(const graph_facts &facts) {
    const ggml_tensor *mask = facts.mask;
    in_flight_.assign(static_cast<size_t>(mask->ne[0] * mask->ne[3]), 0);
    if (!facts.k_cells || facts.sites.empty()) return;
    const attention_site &site = facts.sites[0];
    const int64_t offset = cell_offset(site);
    const int64_t stream_cells =
        mask->ne[3] > 1 ? static_cast<int64_t>(site.cache->nb[3] / site.cache->nb[1]) : INT64_MAX;
    const int64_t *indices = static_cast<const int64_t *>(facts.k_cells->data);
    for (int64_t t = 0; t < facts.k_cells->ne[0]; ++t) {
        const int64_t index = indices[t] - offset;
        if (index < 0) continue;
        const int64_t stream = index / stream_cells, cell = index % stream_cells;
        if (stream < mask->ne[3] && cell < mask->ne[0])
            in_flight_[static_cast<size_t>(stream * mask->ne[0] + cell)] = 1;
    }
}

void hidden_cells::find_in_whole(const graph_facts &facts) {
    layers_.clear();
    for (const attention_site &site : facts.sites) layers_.push_back(key_rows::of(site.cache));
    const std::vector<dropped_cell> &found = scanner_.scan(layers_, facts.mask, in_flight_);
    if (found.empty()) return;
    std::vector<int32_t> borders;
    for (const dropped_cell &d : found) {
        // There are only as many borders as pruning layers.
        if (!borders.empty() && d.first_layer == borders.back()) continue;
        if (std::find(borders.begin(), borders.end(), d.first_layer) == borders.end()) borders.push_back(d.first_layer);
    }
    std::sort(borders.begin(), borders.end());
    for (size_t s = 0; s < level_of_site_.size(); ++s) {
        const auto end = std::upper_bound(borders.begin(), borders.end(), static_cast<int32_t>(s));
        level_of_site_[s] = static_cast<int>(end - borders.begin());
    }
    for (int32_t border : borders) {
        std::vector<dropped_cell> &cells = new_level();
        if (border == borders.back()) {
            cells.assign(found.begin(), found.end());
            continue;
        }
        for (const dropped_cell &d : found) {
            if (d.first_layer <= border) cells.push_back(d);
        }
    }
}

/// For a part of a graph, the cells of this ubatch may be outdated: later layers may still hold an earlier token's
/// keys, while earlier layers already hold the new ones. So each layer is scanned on its own.
void hidden_cells::find_in_part(const graph_facts &facts) {
    for (size_t s = 0; s < facts.sites.size(); ++s) {
        const attention_site &site = facts.sites[s];
        bool written_here = false;
        for (int i = 0; i < site.first; ++i) {
            const ggml_tensor *node = facts.tensors[static_cast<size_t>(i)];
            written_here = written_here || (node->op == host.op_set_rows && root_of(node) == root_of(site.cache));
        }
        layers_ = {key_rows::of(site.cache)};
        static const std::vector<uint8_t> nothing;
        const std::vector<dropped_cell> &found =
            scanner_.scan(layers_, facts.mask, written_here ? in_flight_ : nothing);
        if (found.empty()) continue;
        level_of_site_[s] = n_levels_;
        new_level() = found;
    }
}

}  // namespace agq
