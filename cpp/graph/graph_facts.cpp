#include "graph/graph_facts.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace agq {

namespace {

constexpr char cache_prefix[] = "cache_k_l";
constexpr char value_cache_prefix[] = "cache_v_l";
constexpr char mask_name[] = "attn_inp_kq_mask";
constexpr char positions_name[] = "inp_pos";
constexpr char k_cells_name[] = "attn_inp_k_idxs";
constexpr char out_ids_name[] = "out_ids";
constexpr char block_prefix[] = "blk.";

bool begins(const ggml_tensor *t, const char *prefix) {
    return std::strncmp(t->name, prefix, std::strlen(prefix)) == 0;
}

/// The name that newer releases give to source `slot` of the node, an input, if its use identifies it; else null.
const char *role_of(const ggml_tensor *node, int slot) {
    const ggml_tensor *leaf = node->src[slot];
    if (slot != 1 || leaf->op != host.op_none) return nullptr;
    if (node->op == host.op_set_rows) {
        const ggml_tensor *root = root_of(node);
        return begins(root, cache_prefix)         ? k_cells_name
               : begins(root, value_cache_prefix) ? "attn_inp_v_idxs"
                                                  : nullptr;
    }
    // ggml gives tensors without a name a number.
    if (leaf->name[0] != 0 && !begins(leaf, "leaf_")) return nullptr;
    if (node->op == host.op_rope) return positions_name;
    if (node->op != host.op_get_rows) return nullptr;
    if (node->src[0]->op != host.op_none) return out_ids_name;
    if (is_named(node->src[0], "per_layer_token_embd.weight")) return "inp_layer_tokens";
    return is_named(node->src[0], "position_embd.weight") ? positions_name : nullptr;
}

/// The layer whose weights the queries are made with, or -1.
int layer_of_queries(const ggml_tensor *q) {
    constexpr int most_steps = 32;
    for (int step = 0; step < most_steps && q; ++step) {
        for (const ggml_tensor *src : q->src) {
            const int layer = src && src->op == host.op_none ? block_of(src) : -1;
            if (layer >= 0) return layer;
        }
        // With a quantized cache the host rotates queries: an input of its own times the queries.
        const bool is_rotated = q->src[0] && q->src[0]->op == host.op_none && q->src[1];
        q = is_rotated ? q->src[1] : q->src[0];
    }
    return -1;
}

bool is_mask(const ggml_tensor *t) {
    return t && t->op == host.op_none && is_named(t, mask_name);
}

}  // namespace

bool is_named(const ggml_tensor *t, const char *name) {
    return std::strncmp(t->name, name, sizeof(t->name)) == 0;
}

std::string_view name_of(const ggml_tensor *t) {
    return {t->name, strnlen(t->name, sizeof(t->name))};
}

const ggml_tensor *root_of(const ggml_tensor *t) {
    while (t->view_src) t = t->view_src;
    return t;
}

const ggml_tensor *find_cache(const ggml_tensor *keys) {
    // With a binary32 cache, flash attention reads a binary16 copy.
    for (int step = 0; step < 2; ++step) {
        const ggml_tensor *root = root_of(keys);
        if (root->op == host.op_none) {
            return std::strncmp(root->name, cache_prefix, sizeof(cache_prefix) - 1) == 0 ? keys : nullptr;
        }
        if (!root->src[0]) break;
        keys = root->src[0];
    }
    return nullptr;
}

int cache_layer(const ggml_tensor *cache) {
    return std::atoi(root_of(cache)->name + sizeof(cache_prefix) - 1);
}

int block_of(const ggml_tensor *t) {
    return begins(t, block_prefix) ? std::atoi(t->name + sizeof(block_prefix) - 1) : -1;
}

void graph_facts::read(ggml_tensor **nodes, int n) {
    *this = {};
    n_nodes = n;
    complete = is_part = true;
    const size_t count = static_cast<size_t>(n);
    tensors.assign(nodes, nodes + n);
    numbers_.reserve(2 * count + 16);
    for (int i = 0; i < n; ++i) *numbers_.add(nodes[i]).first = i;
    last_use.assign(count, -1);
    sources_.resize(count);
    for (int i = 0; i < n; ++i) {
        for (int slot = 0; slot < ggml_max_src; ++slot) {
            int &source = sources_[static_cast<size_t>(i)][static_cast<size_t>(slot)];
            source = -1;
            ggml_tensor *src = nodes[i]->src[slot];
            if (!src) continue;
            const auto [number, is_new] = numbers_.add(src);
            if (is_new) {
                *number = static_cast<int>(tensors.size());
                tensors.push_back(src);
                last_use.push_back(-1);
                if (src->op != host.op_none) complete = false;
                find_input(nodes[i], slot);
            }
            source = *number;
            last_use[static_cast<size_t>(source)] = i;
        }
        find_store(nodes[i]);
        if (nodes[i]->flags & ggml_flag_output) is_part = false;
        find_site(i);
    }
    find_kinds();
}

std::string_view graph_facts::input_name(const ggml_tensor *leaf) const {
    const auto known = roles_.find(leaf);
    return known == roles_.end() ? name_of(leaf) : known->second;
}

/// Records source `slot` of the node if it is an input of the graph. The node is the first that reads it.
void graph_facts::find_input(const ggml_tensor *node, int slot) {
    const ggml_tensor *leaf = node->src[slot];
    if (!(leaf->flags & ggml_flag_input)) return;
    if (const char *role = role_of(node, slot)) roles_.emplace(leaf, role);
    const std::string_view name = input_name(leaf);
    if (name == mask_name) masks_.push_back(leaf);
    const struct {
        const char *name;
        const ggml_tensor **slot;
    } known[] = {{"inp_tokens", &tokens}, {positions_name, &positions}, {out_ids_name, &out_ids}};
    for (const auto &input : known) {
        if (name != input.name) continue;
        if (*input.slot) ambiguous = true;
        *input.slot = leaf;
    }
}

void graph_facts::find_store(const ggml_tensor *node) {
    const ggml_tensor *cache = root_of(node);
    if (node->op != host.op_set_rows) return;
    if (begins(cache, value_cache_prefix)) value_stores_.emplace_back(cache, node->src[1]);
    if (!begins(cache, cache_prefix)) return;
    // The cells written by this graph must be known. Otherwise they would be mistaken for those of dropped tokens.
    if (input_name(node->src[1]) == k_cells_name) {
        stores_.emplace_back(cache, node->src[1]);
    } else {
        unknown_store = true;
    }
}

/// Finds the cache of values that an attention reads.
void graph_facts::find_values(attention_site *site) {
    if (site->last < 0) return;
    const ggml_tensor *output = tensors[static_cast<size_t>(site->last)];
    const ggml_tensor *values = output->src[site->last == site->masked ? 2 : 0];
    // With a binary32 cache, flash attention reads a binary16 copy.
    for (int step = 0; step < 3 && values; ++step) {
        values = root_of(values);
        if (values->op == host.op_none) break;
        values = values->src[0];
    }
    if (values && values->op == host.op_none && begins(values, value_cache_prefix)) site->values = values;
}

/// Sorts the sites by their masks.
void graph_facts::find_kinds() {
    for (size_t s = 0; s < sites.size(); ++s) {
        attention_site &site = sites[s];
        const auto same = [&site](const attention_kind &k) { return k.mask == site.mask; };
        const auto found = std::find_if(kinds.begin(), kinds.end(), same);
        site.kind = static_cast<int>(found - kinds.begin());
        if (found == kinds.end()) kinds.push_back({site.mask, nullptr, static_cast<int>(s), nullptr});
        const ggml_tensor *&cells = kinds[static_cast<size_t>(site.kind)].k_cells;
        for (const auto &[cache, its_cells] : stores_) {
            if (cache != root_of(site.cache)) continue;
            ambiguous = ambiguous || (cells && cells != its_cells);
            cells = its_cells;
            site.is_stored = true;
        }
        find_values(&site);
        const ggml_tensor *&places = kinds[static_cast<size_t>(site.kind)].v_cells;
        for (const auto &[cache, its_places] : value_stores_) {
            if (cache == site.values) places = its_places;
        }
    }
    const auto has = [this](const ggml_tensor *m, const ggml_tensor *c) {
        return std::count_if(kinds.begin(), kinds.end(),
                             [m, c](const attention_kind &k) { return (!m || k.mask == m) && (!c || k.k_cells == c); });
    };
    // In a part of a graph, the attention that belongs to a store may be in the next part.
    const auto is_one = [this](auto n) { return n == 1 || (n == 0 && !complete); };
    for (const ggml_tensor *m : masks_) ambiguous = ambiguous || !is_one(has(m, nullptr));
    for (const auto &store : stores_) ambiguous = ambiguous || !is_one(has(nullptr, store.second));
    if (!kinds.empty()) mask = kinds[0].mask;
    k_cells = !kinds.empty() && kinds[0].k_cells ? kinds[0].k_cells : stores_.empty() ? nullptr : stores_[0].second;
}

void graph_facts::find_site(int i) {
    const ggml_tensor *node = tensors[static_cast<size_t>(i)];
    attention_pattern found;
    if (match_attention(node, &found)) {
        attention_site site;
        static_cast<attention_operands &>(site) = found;
        site.cache = find_cache(found.k);
        if (!site.cache || !is_mask(found.mask)) return;
        const auto shares = [&site](const attention_site &s) { return root_of(s.cache) == root_of(site.cache); };
        const auto owner = std::find_if(sites.begin(), sites.end(), shares);
        site.owner = static_cast<int>(owner - sites.begin());
        site.layer = owner == sites.end() ? cache_layer(site.cache) : layer_of_queries(found.q);
        site.first = number(found.scores);
        site.masked = i;
        if (found.scores == node) site.last = i;
        site.mask_slot = found.mask_slot;
        site.is_known = found.is_known;
        sites.push_back(site);
    } else if (const ggml_tensor *soft_max = soft_max_before(node)) {
        for (attention_site &site : sites) {
            if (tensors[static_cast<size_t>(site.masked)] == soft_max) site.last = i;
        }
    }
}

}  // namespace agq
