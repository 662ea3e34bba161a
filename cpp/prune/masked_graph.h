// A graph of the host in which every attention has a mask of its own that hides dropped tokens: what runs when no
// tokens are dropped, above all in decoding. It is kept while the host repeats its graph; only the masks' memory
// changes.
#pragma once

#include <vector>

#include "graph_copy.h"
#include "hidden_cells.h"

namespace agq {

class masked_graph {
  public:
    /// Builds the nodes. Throws std::bad_alloc.
    void build(const graph_facts &facts);
    bool is_built() const { return !nodes_.empty(); }
    void clear() { nodes_.clear(); }
    /// Fills the masks for this ubatch. Throws std::bad_alloc.
    void fill(const graph_facts &facts, const hidden_cells &hidden);
    std::vector<ggml_tensor *> &nodes() { return nodes_; }

  private:
    tensor_arena arena_;
    graph_copy copy_;
    std::vector<ggml_tensor *> nodes_;
    std::vector<ggml_tensor *> masks_;                ///< by site
    std::vector<std::vector<unsigned char>> levels_;  ///< masks of each level from 1 on
};

}  // namespace agq
