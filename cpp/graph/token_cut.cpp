#include "graph/token_cut.h"

#include <algorithm>

#include "host/tensor_rows.h"

namespace agq {

std::string find_gap(const graph_facts &facts) {
    // Whole graphs select the tokens whose logits are wanted. If a graph is split, its first part has no sources
    // outside itself, so `complete` does not show the split.
    if (!facts.complete || (facts.k_cells && !facts.out_ids)) {
        return "the host computes the graph in parts (an evaluation callback, or several devices)";
    }
    if (facts.is_part && facts.sites.empty()) {
        return "attention and its K/V cache are on another device, or the host computes the graph in parts";
    }
    if (facts.sites.empty() || !facts.k_cells) return "the model has no causal K/V cache";
    if (facts.ambiguous) return "the model has attention masks or inputs that pruning cannot tell apart";
    for (const attention_kind &kind : facts.kinds) {
        if (!kind.k_cells) return "the model reads the K/V cache of another model";
        if (kind.mask->ne[3] != 1) return "the ubatch holds several streams of sequences";
    }
    for (size_t i = 0; i < facts.sites.size(); ++i) {
        const attention_site &site = facts.sites[i];
        if (site.last < 0) return "the output of an attention was not found";
        if (!site.is_stored) return "a layer reads a K/V cache that the graph does not store to";
        if (site.kind != facts.sites[static_cast<size_t>(site.owner)].kind) {
            return "layers with and without a sliding window share a K/V cache";
        }
        if (i > 0 && site.layer <= facts.sites[i - 1].layer) return "it is not known which layer an attention is in";
    }
    return "";
}

int find_last_states(const graph_facts &facts, const std::vector<token_dim> &dims) {
    for (int i = 0; i < facts.n_nodes; ++i) {
        const ggml_tensor *lookup = facts.tensors[static_cast<size_t>(i)];
        if (lookup->op != host.op_get_rows || lookup->src[1] != facts.out_ids) continue;
        const ggml_tensor *states = lookup->src[0];
        const int number = facts.number(states);
        const bool is_kept = number < facts.n_nodes && states->flags & ggml_flag_output;
        if (is_kept && !states->view_src && dims[static_cast<size_t>(number)] == token_dim{1, 1}) return number;
    }
    return -1;
}

bool is_wanted_whole(const graph_facts &facts, const std::vector<token_dim> &dims, int first_cut) {
    const size_t n = static_cast<size_t>(facts.n_nodes);
    if (dims[n - 1]) return true;
    const int last_states = find_last_states(facts, dims);
    for (size_t i = static_cast<size_t>(first_cut); i < n; ++i) {
        if (static_cast<int>(i) == last_states) continue;
        if (dims[i] && (facts.tensors[i]->flags & ggml_flag_output)) return true;
    }
    return false;
}

std::string find_site(const graph_facts &facts, int layer, int *site) {
    const auto found = std::find_if(facts.sites.begin(), facts.sites.end(),
                                    [layer](const attention_site &s) { return s.layer == layer; });
    if (found == facts.sites.end() || found + 1 == facts.sites.end()) {
        return "layer " + std::to_string(layer) +
               " cannot be a pruning layer: it must have attention and come before " + "the last layer, which is " +
               std::to_string(facts.sites.back().layer);
    }
    *site = static_cast<int>(found - facts.sites.begin());
    return "";
}

std::string find_crossing(const graph_facts &facts, const std::vector<token_dim> &dims, int at,
                          std::vector<int> *crossing) {
    for (size_t i = 0; i < facts.tensors.size(); ++i) {
        const ggml_tensor *t = facts.tensors[i];
        const bool before = static_cast<int>(i) <= at || static_cast<int>(i) >= facts.n_nodes;
        const auto is_mask = [t](const attention_kind &kind) { return kind.mask == t; };
        if (!before || !dims[i] || facts.last_use[i] <= at) continue;
        if (std::any_of(facts.kinds.begin(), facts.kinds.end(), is_mask)) continue;
        if (!is_contiguous(t)) return "the tensor '" + std::string(name_of(t)) + "' is not contiguous";
        crossing->push_back(static_cast<int>(i));
    }
    return "";
}

}  // namespace agq
