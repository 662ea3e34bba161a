// A copy of the host's graph in which every attention has its own mask that hides dropped tokens. It runs when no
// tokens are dropped, above all in decoding. It is kept while the host repeats its graph; only the memory of the masks
// changes.
#pragma once

#include <deque>
#include <vector>

#include "nodes/attention.h"
#include "nodes/sequence_groups.h"
#include "prune/graph_copy.h"
#include "prune/hidden_cells.h"

namespace agq {

class masked_graph {
  public:
    /// Builds the nodes. Throws std::bad_alloc.
    void build(const graph_facts &facts);
    bool is_built() const { return !nodes_.empty(); }
    void clear() { nodes_.clear(); }
    /// Fills the masks for this ubatch. `whole`: the groups of the host's masks; `own_cells`: by kind of attention, the
    /// column of each token, empty if it is not known. Throws std::bad_alloc.
    void fill(const graph_facts &facts, const hidden_cells &hidden, const key_choices &whole,
              const std::vector<std::vector<int32_t>> &own_cells);
    std::vector<ggml_tensor *> &nodes() { return nodes_; }
    /// The key choices for the latest ubatch.
    const key_choices &choices() const { return choices_; }

  private:
    /// The masks of one level.
    struct level_mask {
        std::vector<unsigned char> full;  ///< the host's mask, with dropped tokens hidden
        sequence_groups groups;
    };

    static void fill_level(const ggml_tensor *mask, const std::vector<dropped_cell> &hidden, level_mask *level);

    tensor_arena arena_;
    graph_copy copy_;
    std::vector<ggml_tensor *> nodes_;
    std::vector<ggml_tensor *> masks_;  ///< by site
    key_choices choices_;
    std::deque<level_mask> levels_;  ///< unused for those that hide nothing; addresses stay valid
};

}  // namespace agq
