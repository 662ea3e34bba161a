#include "prune/side_cache.h"

#include <set>

#include "graph/dataflow.h"

namespace agq {

std::string side_cache::make(const graph_facts &copied, int first_cut, int kind, int64_t stream) {
    facts_ = &copied;
    stream_ = stream;
    views_.clear();
    layers_.resize(copied.sites.size());
    for (size_t s = static_cast<size_t>(first_cut) + 1; copied.kinds.size() > 1 && s < copied.sites.size(); ++s) {
        const attention_site &site = copied.sites[s];
        if (site.kind == kind || !copied.owns_cache(s)) continue;
        const cell_rows rows = cell_rows::of(copied, site, stream);
        if (!rows.is_usable()) return "the values of an attention with a window were not found";
        const size_t n = static_cast<size_t>(room(site.kind));
        const bool is_transposed = copied.kinds[static_cast<size_t>(site.kind)].v_cells->ne[0] > copied.n_tokens();
        layer &own = layers_[s];
        if (!resize(&own.keys, &own.key_bytes, n * root_of(site.cache)->nb[1]) ||
            !resize(&own.values, &own.value_bytes, is_transposed ? site.values->nb[2] : n * site.values->nb[1])) {
            return "there is no memory for another cache of windows";
        }
        own.own = rows.at(own.keys.get(), own.values.get());
    }
    find_views(first_cut);
    return "";
}

/// Makes memory of zeros, because what no token has written is multiplied, too.
bool side_cache::resize(std::unique_ptr<char, free_memory> *memory, size_t *now, size_t bytes) {
    if (*now == bytes) return true;
    memory->reset();
    memory->reset(static_cast<char *>(std::calloc(bytes, 1)));
    *now = *memory ? bytes : 0;
    return *memory != nullptr;
}

void side_cache::find_views(int first_cut) {
    const auto node_of = [this](const ggml_tensor *t) {
        const int number = t ? facts_->number(t) : -1;  // the cache itself is no node of the graph
        return number >= 0 && number < facts_->n_nodes ? facts_->tensors[static_cast<size_t>(number)] : nullptr;
    };
    std::set<const ggml_tensor *> read;
    for (const attention_site &site : facts_->sites) {
        const ggml_tensor *output = facts_->tensors[static_cast<size_t>(site.last)];
        const bool is_flash = site.last == site.masked;
        for (const ggml_tensor *t : {site.k, static_cast<const ggml_tensor *>(output->src[is_flash ? 2 : 0])}) {
            for (const ggml_tensor *node = node_of(t); node; node = node_of(node->src[0])) read.insert(node);
        }
    }
    for (int i = 0; i < facts_->n_nodes; ++i) {
        ggml_tensor *t = facts_->tensors[static_cast<size_t>(i)];
        const ggml_tensor *root = root_of(t);
        const bool is_read = read.count(t) != 0;
        if (root == t || root->op != host.op_none || (is_read && !is_view_op(t))) continue;
        for (size_t s = static_cast<size_t>(first_cut) + 1; s < facts_->sites.size(); ++s) {
            const attention_site &site = facts_->sites[s];
            const bool is_of_keys = root == root_of(site.cache);
            if (!is_of_keys && root != site.values) continue;
            views_.push_back({t, static_cast<char *>(t->data), static_cast<int>(s), is_of_keys, is_read});
            break;
        }
    }
}

void side_cache::show(int kind, int64_t stream) {
    for (const view &v : views_) {
        const ggml_tensor *root = root_of(v.tensor);
        const int64_t stream_bytes = static_cast<int64_t>(root->nb[2]);
        const attention_site &site = facts_->sites[static_cast<size_t>(v.site)];
        if (site.kind == kind) {
            v.tensor->data = v.of_host + (v.is_read ? (stream - stream_) * stream_bytes : 0);
        } else {
            const layer &own = layers_[static_cast<size_t>(v.site)];
            char *begin = v.is_of_keys ? own.keys.get() : own.values.get();
            v.tensor->data = begin + (v.of_host - static_cast<char *>(root->data)) % stream_bytes;
        }
    }
}

cell_rows side_cache::rows_of_host(int site, int64_t stream) const {
    return cell_rows::of(*facts_, facts_->sites[static_cast<size_t>(site)], stream);
}

}  // namespace agq
