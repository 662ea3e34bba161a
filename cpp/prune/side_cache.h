// Memory for the keys and values that early tokens have in layers with a window. Their cells of the host's cache may
// hold other tokens by now. Views of a copied graph are pointed at it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "graph/graph_facts.h"
#include "prune/cell_rows.h"

namespace agq {

class side_cache {
  public:
    /// Finds the views of caches among the nodes of a copied graph, which reads `stream`. Makes memory for attentions
    /// behind `first_cut`, except those of `kind`, which have no window (-1: any might have one). Returns the reason if
    /// that is not possible, else empty. Throws std::bad_alloc.
    std::string make(const graph_facts &copied, int first_cut, int kind, int64_t stream);
    /// Lets the views show this stream of the host's cache for attentions of `kind`, and this memory for others.
    void show(int kind, int64_t stream);
    /// The keys and values of an attention in this memory.
    const cell_rows &rows(int site) const { return layers_[static_cast<size_t>(site)].own; }
    /// The same in the host's cache.
    cell_rows rows_of_host(int site, int64_t stream) const;
    /// How many tokens there is room for in a kind of attention.
    int64_t room(int kind) const { return facts_->kinds[static_cast<size_t>(kind)].mask->ne[0]; }

  private:
    struct free_memory {
        void operator()(char *memory) const { std::free(memory); }
    };
    struct layer {
        cell_rows own;
        std::unique_ptr<char, free_memory> keys, values;
        size_t key_bytes = 0, value_bytes = 0;
    };
    struct view {
        ggml_tensor *tensor;
        char *of_host;
        int site;
        bool is_of_keys, is_read;
    };

    static bool resize(std::unique_ptr<char, free_memory> *memory, size_t *now, size_t bytes);
    void find_views(int first_cut);

    const graph_facts *facts_ = nullptr;
    int64_t stream_ = 0;         ///< the one that the graph read when it was copied
    std::vector<layer> layers_;  ///< by site
    std::vector<view> views_;
};

}  // namespace agq
