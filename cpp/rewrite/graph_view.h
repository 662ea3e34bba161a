// The nodes of a graph and their readers, for those who look for patterns among them.
#pragma once

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "graph/graph_facts.h"
#include "host/host.h"
#include "host/tensor_rows.h"

namespace agq {

/// Whether the rows are contiguous binary32 numbers in memory.
inline bool is_rows(const ggml_tensor *t) {
    return t && t->type == ggml_type_f32 && t->nb[0] == sizeof(float) && t->data;
}

inline bool same_shape(const ggml_tensor *a, const ggml_tensor *b) {
    return std::equal(a->ne, a->ne + 4, b->ne);
}

/// Whether rows of `out` may be written while other rows of `in` are still to be read.
inline bool independent_rows(const ggml_tensor *out, const ggml_tensor *in) {
    const bool same = out->data == in->data && same_shape(out, in) && std::equal(out->nb, out->nb + 4, in->nb);
    return same || !shares_memory(out, in);
}

/// The nodes of a graph, and which nodes read which tensor.
class graph_view {
  public:
    graph_view(ggml_tensor **nodes, int n) : nodes_(nodes), n_(n) {
        for (int i = 0; i < n; ++i) {
            position_[nodes[i]] = i;
            for (const ggml_tensor *src : nodes[i]->src) {
                if (src) readers_[src].push_back(i);
            }
        }
    }

    int position(const ggml_tensor *t) const {
        const auto found = position_.find(t);
        return found == position_.end() ? -1 : found->second;
    }

    /// Nodes that read the tensor, ascending; a node that reads it twice is listed twice.
    const std::vector<int> &readers(const ggml_tensor *t) const {
        static const std::vector<int> none;
        const auto found = readers_.find(t);
        return found == readers_.end() ? none : found->second;
    }

    /// The node before node `i`, not counting empty operations; -1 if there is none.
    int before(int i) const {
        for (--i; i >= 0 && is_empty_op(nodes_[i]->op);) --i;
        return i;
    }

    /// Whether a node from `i` on overwrites the tensor's memory. Then no later node reads the tensor, here or in
    /// another part of the host's graph.
    bool is_over(const ggml_tensor *t, int i) const {
        for (; i < n_; ++i) {
            if (!is_empty_op(nodes_[i]->op) && root_of(nodes_[i]) != t && nodes_[i]->data &&
                shares_memory(nodes_[i], t))
                return true;
        }
        return false;
    }

    /// Whether no node after `from` and before `to` writes to the tensor's memory.
    bool is_unchanged(const ggml_tensor *t, int from, int to) const {
        for (int i = from + 1; i < to; ++i) {
            if (!is_empty_op(nodes_[i]->op) && nodes_[i]->data && shares_memory(nodes_[i], t)) return false;
        }
        return true;
    }

    /// Whether nothing but node `reader` needs the tensor.
    bool is_private(const ggml_tensor *t, int reader) const {
        const std::vector<int> &all = readers(t);
        return all.size() == 1 && all[0] == reader && !(t->flags & ggml_flag_output) && is_over(t, reader);
    }

  private:
    ggml_tensor **nodes_;
    int n_;
    std::unordered_map<const ggml_tensor *, int> position_;
    std::unordered_map<const ggml_tensor *, std::vector<int>> readers_;
};

}  // namespace agq
