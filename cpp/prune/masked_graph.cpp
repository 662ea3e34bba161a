#include "prune/masked_graph.h"

#include <cmath>
#include <cstring>

#include "graph/mask_view.h"

namespace agq {

namespace {

template <typename Element>
void hide_all(const ggml_tensor *mask, unsigned char *copy, const std::vector<dropped_cell> &cells, Element hidden) {
    for (const dropped_cell &d : cells) {
        for (int64_t token = 0; token < mask->ne[1]; ++token) {
            unsigned char *row =
                copy + static_cast<size_t>(d.stream) * mask->nb[3] + static_cast<size_t>(token) * mask->nb[1];
            reinterpret_cast<Element *>(row)[d.cell] = hidden;
        }
    }
}

}  // namespace

void masked_graph::build(const graph_facts &facts) {
    nodes_.clear();
    masks_.clear();
    arena_.clear();
    copy_.begin(&facts, nullptr, 0, &arena_);
    size_t site = 0;
    std::vector<ggml_tensor *> nodes;
    nodes.reserve(static_cast<size_t>(facts.n_nodes));
    for (int i = 0; i < facts.n_nodes; ++i) {
        ggml_tensor *mask = nullptr;
        int slot = 0;
        if (site < facts.sites.size() && facts.sites[site].masked == i) {
            slot = facts.sites[site].mask_slot;
            mask = arena_.copy(facts.sites[site].mask);
            masks_.push_back(mask);
            ++site;
        }
        nodes.push_back(copy_.node(i, 0, mask, slot));
    }
    nodes_.swap(nodes);
}

void masked_graph::fill_level(const ggml_tensor *mask, const std::vector<dropped_cell> &hidden, level_mask *level) {
    level->full.resize(mask->nb[3] * static_cast<size_t>(mask->ne[3]));
    std::memcpy(level->full.data(), mask->data, level->full.size());
    if (mask->type == ggml_type_f16) {
        hide_all<uint16_t>(mask, level->full.data(), hidden, hidden_f16);
    } else {
        hide_all<float>(mask, level->full.data(), hidden, -INFINITY);
    }
}

void masked_graph::fill(const graph_facts &facts, const hidden_cells &hidden, const key_choices &whole,
                        const std::vector<std::vector<int32_t>> &own_cells) {
    while (levels_.size() < static_cast<size_t>(hidden.levels())) levels_.emplace_back();
    std::vector<const std::vector<key_group> *> groups;
    for (int i = 0; i < hidden.levels(); ++i) {
        const size_t kind = static_cast<size_t>(hidden.kind(i));
        const ggml_tensor *mask = facts.kinds[kind].mask;
        if (hidden.cells(i).empty()) {
            const auto found = whole.find(mask);
            groups.push_back(found == whole.end() ? nullptr : &found->second);
            continue;
        }
        level_mask &level = levels_[static_cast<size_t>(i)];
        fill_level(mask, hidden.cells(i), &level);
        const int64_t tokens = facts.n_tokens() / mask->ne[3];
        const char *rows = reinterpret_cast<const char *>(level.full.data());
        const int32_t *own = own_cells[kind].empty() ? nullptr : own_cells[kind].data();
        groups.push_back(&level.groups.find(mask, rows, tokens, own));
    }
    choices_.clear();
    for (size_t s = 0; s < masks_.size(); ++s) {
        const size_t level = static_cast<size_t>(hidden.level(static_cast<int>(s)));
        const bool hides = !hidden.cells(static_cast<int>(level)).empty();
        masks_[s]->data = hides ? levels_[level].full.data() : facts.sites[s].mask->data;
        if (groups[level]) choices_.emplace(masks_[s], *groups[level]);
    }
}

}  // namespace agq
