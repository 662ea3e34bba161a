// Which cells of the cache belong to dropped tokens, for each attention of the current graph.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/graph_facts.h"
#include "prune/zero_rows.h"

namespace agq {

class hidden_cells {
  public:
    /// Scans the cache as it is before the graph is computed. All sites must share facts.mask. Returns whether any cell
    /// is hidden. Throws std::bad_alloc.
    bool find(const graph_facts &facts);

    /// The level of an attention. Attentions of one level hide the same cells; level 0 hides none.
    int level(int site) const { return level_of_site_[static_cast<size_t>(site)]; }
    int levels() const { return n_levels_; }
    /// The hidden cells of a level, by stream and cell.
    const std::vector<dropped_cell> &cells(int level) const { return cells_[static_cast<size_t>(level)]; }

  private:
    void mark_in_flight(const graph_facts &facts);
    void find_in_whole(const graph_facts &facts);
    void find_in_part(const graph_facts &facts);
    std::vector<dropped_cell> &new_level();

    zero_row_scanner scanner_;
    std::vector<key_rows> layers_;
    std::vector<uint8_t> in_flight_;  ///< cells that this ubatch writes, by stream and cell
    std::vector<int> level_of_site_;
    std::vector<std::vector<dropped_cell>> cells_;  ///< by level; may be longer than n_levels_, to reuse memory
    int n_levels_ = 1;
};

}  // namespace agq
