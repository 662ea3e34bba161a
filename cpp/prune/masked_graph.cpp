#include "masked_graph.h"

#include <cmath>
#include <cstring>

namespace agq {

namespace {

void hide(const ggml_tensor *mask, unsigned char *copy, const dropped_cell &d) {
    for (int64_t token = 0; token < mask->ne[1]; ++token) {
        unsigned char *p = copy + static_cast<size_t>(d.stream) * mask->nb[3] +
                           static_cast<size_t>(token) * mask->nb[1] + static_cast<size_t>(d.cell) * mask->nb[0];
        if (mask->type == ggml_type_f16) {
            const uint16_t hidden = 0xFC00;
            std::memcpy(p, &hidden, sizeof(hidden));
        } else {
            const float hidden = -INFINITY;
            std::memcpy(p, &hidden, sizeof(hidden));
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

void masked_graph::fill(const graph_facts &facts, const hidden_cells &hidden) {
    const ggml_tensor *mask = facts.mask;
    const size_t bytes = mask->nb[3] * static_cast<size_t>(mask->ne[3]);
    if (levels_.size() < static_cast<size_t>(hidden.levels())) levels_.resize(static_cast<size_t>(hidden.levels()));
    for (int level = 1; level < hidden.levels(); ++level) {
        std::vector<unsigned char> &copy = levels_[static_cast<size_t>(level)];
        copy.resize(bytes);
        std::memcpy(copy.data(), mask->data, bytes);
        for (const dropped_cell &d : hidden.cells(level)) hide(mask, copy.data(), d);
    }
    for (size_t s = 0; s < masks_.size(); ++s) {
        const int level = hidden.level(static_cast<int>(s));
        masks_[s]->data = level == 0 ? mask->data : levels_[static_cast<size_t>(level)].data();
    }
}

}  // namespace agq
