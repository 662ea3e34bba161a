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
            mask = arena_.copy(facts.mask);
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
    level->choice = {};
    // A single token uses the host's attention, which knows only masks.
    if (mask->ne[3] == 1 && mask->ne[1] > 1) choose_keys(mask, hidden, level);
}

void masked_graph::choose_keys(const ggml_tensor *mask, const std::vector<dropped_cell> &hidden, level_mask *level) {
    std::vector<uint8_t> seen(static_cast<size_t>(mask->ne[0]), 0);
    for (int64_t token = 0; token < mask->ne[1]; ++token)
        mask_row(mask, token, 0).mark_visible(mask->ne[0], seen.data());
    for (const dropped_cell &d : hidden) seen[static_cast<size_t>(d.cell)] = 0;
    level->cells.clear();
    for (size_t c = 0; c < seen.size(); ++c) {
        if (seen[c]) level->cells.push_back(static_cast<int32_t>(c));
    }
    const size_t element = mask->nb[0], stride = level->cells.size() * element;
    level->chosen.resize(stride * static_cast<size_t>(mask->ne[1]));
    unsigned char *to = level->chosen.data();
    for (int64_t token = 0; token < mask->ne[1]; ++token) {
        const unsigned char *row = level->full.data() + static_cast<size_t>(token) * mask->nb[1];
        for (int32_t c : level->cells) {
            std::memcpy(to, row + static_cast<size_t>(c) * element, element);
            to += element;
        }
    }
    level->choice.cells = level->cells.data();
    level->choice.n = static_cast<int64_t>(level->cells.size());
    level->choice.mask = reinterpret_cast<const char *>(level->chosen.data());
    level->choice.mask_stride = stride;
}

void masked_graph::fill(const graph_facts &facts, const hidden_cells &hidden) {
    while (levels_.size() < static_cast<size_t>(hidden.levels())) levels_.emplace_back();
    for (int level = 1; level < hidden.levels(); ++level) {
        fill_level(facts.mask, hidden.cells(level), &levels_[static_cast<size_t>(level)]);
    }
    choices_.clear();
    for (size_t s = 0; s < masks_.size(); ++s) {
        const int level = hidden.level(static_cast<int>(s));
        level_mask &chosen = levels_[static_cast<size_t>(level)];
        masks_[s]->data = level == 0 ? facts.mask->data : chosen.full.data();
        if (level > 0 && chosen.choice.mask) choices_.emplace(masks_[s], chosen.choice);
    }
}

}  // namespace agq
