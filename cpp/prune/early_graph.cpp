#include "prune/early_graph.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace agq {

namespace {

constexpr size_t most_memory = size_t{4} << 30;  ///< of the copied nodes

/// Whether a leaf belongs to the graph, not to the model or its cache.
bool is_of_graph(const ggml_tensor *leaf, const ggml_backend_buffer *buffer) {
    return (leaf->flags & ggml_flag_input) || leaf->buffer == buffer;
}

}  // namespace

std::string early_graph::capture(const graph_facts &facts, const prune_plan &plan, const waiting_sites &sites) {
    nodes_.clear();
    tensors_.clear();
    weights_.clear();
    weight_data_.clear();
    needed_.clear();
    const size_t n_nodes = static_cast<size_t>(facts.n_nodes);
    const ggml_backend_buffer *buffer = facts.tensors[0]->buffer;
    std::vector<ggml_tensor *> copies(facts.tensors.size(), nullptr);
    size_t constant_bytes = 0;
    for (size_t i = 0; i < facts.tensors.size(); ++i) {
        const ggml_tensor *t = facts.tensors[i];
        if (i < n_nodes || is_of_graph(t, buffer)) {
            copies[i] = &tensors_.emplace_back(*t);
            if (i >= n_nodes && !plan.dims[i]) constant_bytes += (host.ggml_nbytes(t) + 63) / 64 * 64;
        } else {
            weights_.push_back(t);
            weight_data_.push_back(t->data);
        }
    }
    const auto copy_of = [&](ggml_tensor *t) {
        const int number = t ? facts.number(t) : -1;
        return number < 0 || !copies[static_cast<size_t>(number)] ? t : copies[static_cast<size_t>(number)];
    };
    for (ggml_tensor &t : tensors_) {
        for (ggml_tensor *&src : t.src) src = copy_of(src);
        t.view_src = copy_of(t.view_src);
    }
    // Inputs that do not depend on the tokens keep their values.
    constants_.reset(new char[constant_bytes + 64]);
    size_t used = (64 - reinterpret_cast<uintptr_t>(constants_.get()) % 64) % 64;
    for (size_t i = n_nodes; i < facts.tensors.size(); ++i) {
        if (!copies[i] || plan.dims[i]) continue;
        const size_t bytes = host.ggml_nbytes(facts.tensors[i]);
        std::memcpy(constants_.get() + used, facts.tensors[i]->data, bytes);
        copies[i]->data = constants_.get() + used;
        used += (bytes + 63) / 64 * 64;
    }
    for (size_t i = 0; i < n_nodes; ++i) nodes_.push_back(copies[i]);
    facts_.read(nodes_.data(), static_cast<int>(n_nodes));
    plan_ = plan;
    std::string obstacle;
    if (facts_.tensors.size() != facts.tensors.size() || facts_.sites.size() != facts.sites.size()) {
        obstacle = "the host's graph cannot be copied";
    }
    if (obstacle.empty()) obstacle = find_needed(facts);
    if (obstacle.empty()) {
        obstacle = side_.make(facts_, plan.cuts[0].site, sites.is_sure ? sites.kind : -1, stream_of(facts));
    }
    if (!obstacle.empty()) nodes_.clear();
    return obstacle;
}

/// Finds the nodes of each segment that early tokens need, and gives them memory.
std::string early_graph::find_needed(const graph_facts &facts) {
    records_.clear();
    for (const prune_cut &cut : plan_.cuts) {
        records_.push_back(record_of(facts_, plan_.dims, cut.crossing, records_.empty()));
    }
    needed_.assign(plan_.cuts.size() + 1, {});
    std::set<int> all;
    for (size_t segment = 1; segment < needed_.size(); ++segment) {
        const int begin = plan_.cuts[segment - 1].at + 1;
        const bool is_last = segment == plan_.cuts.size();
        const int end = is_last ? facts_.n_nodes : plan_.cuts[segment].at + 1;
        std::vector<int> open;
        for (int i = begin; i < end; ++i) {
            if (facts_.tensors[static_cast<size_t>(i)]->op == host.op_set_rows) open.push_back(i);
        }
        if (!is_last) {
            for (int number : plan_.cuts[segment].crossing) {
                if (number >= begin && number < end) open.push_back(number);
            }
        }
        std::set<int> needed;
        while (!open.empty()) {
            const int i = open.back();
            open.pop_back();
            if (!needed.insert(i).second) continue;
            for (int slot = 0; slot < ggml_max_src; ++slot) {
                const int number = facts_.source(i, slot);
                if (number < 0 || number >= facts_.n_nodes) continue;
                const bool is_given = number < begin && plan_.dims[static_cast<size_t>(number)];
                if (is_given) continue;
                const bool is_of_cache = root_of(facts_.tensors[static_cast<size_t>(number)])->op == host.op_none;
                if (number < begin && !is_of_cache) return "a node before the cut does not depend on the tokens";
                if (number >= begin) open.push_back(number);
            }
        }
        needed_[segment].assign(needed.begin(), needed.end());
        all.insert(needed.begin(), needed.end());
    }
    // The host's plan of its memory is good for these nodes, too. Only the address changes.
    const char *low = nullptr, *high = nullptr;
    const auto in_compute_memory = [&](const ggml_tensor *t) { return root_of(t)->op != host.op_none; };
    for (int i : all) {
        const ggml_tensor *t = facts.tensors[static_cast<size_t>(i)];
        if (!in_compute_memory(t) || !t->data) continue;
        const char *data = static_cast<const char *>(t->data);
        low = low ? std::min(low, data) : data;
        high = std::max(high, data + host.ggml_nbytes(t));
    }
    const size_t bytes = static_cast<size_t>(high - low);
    if (bytes > most_memory) return "the memory of the host's graph is too large to copy";
    if (memory_size_ < bytes + 64) {
        memory_.reset();
        memory_size_ = 0;
        memory_.reset(new char[bytes + 64]);
        memory_size_ = bytes + 64;
    }
    char *base = memory_.get();
    while ((reinterpret_cast<uintptr_t>(base) ^ reinterpret_cast<uintptr_t>(low)) % 64 != 0) ++base;
    // Nodes that are not needed move as well, because offsets of views are found from both addresses.
    for (ggml_tensor *t : nodes_) {
        if (!in_compute_memory(t) || !t->data) continue;
        t->data = base + (reinterpret_cast<uintptr_t>(t->data) - reinterpret_cast<uintptr_t>(low));
    }
    return "";
}

bool early_graph::fits(const graph_facts &now) const {
    if (nodes_.empty() || !now.complete || now.sites.size() != facts_.sites.size()) return false;
    for (size_t s = 0; s < now.sites.size(); ++s) {
        if (now.sites[s].layer != facts_.sites[s].layer) return false;
    }
    size_t n_weights = 0;
    for (size_t i = static_cast<size_t>(now.n_nodes); i < now.tensors.size(); ++i) {
        n_weights += !is_of_graph(now.tensors[i], now.tensors[0]->buffer);
    }
    if (n_weights != weights_.size()) return false;
    for (size_t i = 0; i < weights_.size(); ++i) {
        const int number = now.number(weights_[i]);
        if (number < 0 || now.tensors[static_cast<size_t>(number)]->data != weight_data_[i]) return false;
    }
    return true;
}

bool early_graph::reaches(const early_tokens &tokens) const {
    if (tokens.missing.empty()) return true;
    const int64_t n_cells = side_.room(tokens.kind);
    const int32_t last = tokens.missing.back().place;
    if (std::any_of(tokens.cells.begin(), tokens.cells.begin() + last + 1,
                    [n_cells](int32_t cell) { return cell >= n_cells; })) {
        return false;
    }
    for (size_t k = 0; k < tokens.windows.size(); ++k) {
        const int64_t room = side_.room(static_cast<int>(k));
        const auto is_wide = [&](const early_token &t) {
            return t.place + 1 - tokens.windows[k].first[static_cast<size_t>(t.place)] > room;
        };
        const bool has_window = static_cast<int>(k) != tokens.kind;
        if (has_window && std::any_of(tokens.missing.begin(), tokens.missing.end(), is_wide)) return false;
    }
    return true;
}

bool early_graph::reaches_all_of(const graph_facts &now) const {
    for (size_t k = 0; k < now.kinds.size(); ++k) {
        if (side_.room(static_cast<int>(k)) < now.kinds[k].mask->ne[0]) return false;
    }
    return true;
}

}  // namespace agq
