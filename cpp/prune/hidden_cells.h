// Which cells of the cache belong to dropped tokens, for each attention of the current graph.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "graph/graph_facts.h"
#include "prune/zero_rows.h"

namespace agq {

class hidden_cells {
  public:
    /// Scans the caches as they are before the graph is computed. Returns whether any cell is hidden. Throws
    /// std::bad_alloc.
    bool find(const graph_facts &facts);

    /// The level of an attention. Attentions of one level are of one kind and hide the same cells. Level k, for each
    /// kind k, hides none.
    int level(int site) const { return level_of_site_[static_cast<size_t>(site)]; }
    int levels() const { return n_levels_; }
    /// The kind of attention of a level.
    int kind(int level) const { return kind_of_level_[static_cast<size_t>(level)]; }
    /// The hidden cells of a level, by stream and cell. `first_layer` is the index of an attention.
    const std::vector<dropped_cell> &cells(int level) const { return cells_[static_cast<size_t>(level)]; }

  private:
    void find_in_whole(const graph_facts &facts, int kind);
    void find_in_part(const graph_facts &facts);
    void use_levels(const graph_facts &facts, int kind);
    std::vector<dropped_cell> &new_level(int kind);
    std::vector<dropped_cell> &next_level(int kind);

    std::deque<zero_row_scanner> scanners_;  ///< by kind
    /// Of a kind in a whole graph: what the last scan has led to.
    struct last_levels {
        std::vector<int32_t> sites, borders;  ///< layers that are scanned; indices of those where tokens are dropped
        int first = 0;                        ///< level
        uint64_t number = 0;                  ///< of the call of `find`; 0: none
    };

    uint64_t calls_ = 0;             ///< of `find`
    std::vector<last_levels> last_;  ///< by kind
    std::vector<key_rows> layers_;
    std::vector<std::vector<uint8_t>> in_flight_;  ///< by kind: cells that this ubatch writes, by stream and cell
    std::vector<int> level_of_site_, kind_of_level_;
    std::vector<std::vector<dropped_cell>> cells_;  ///< by level; may be longer than n_levels_, to reuse memory
    int n_levels_ = 1;
};

}  // namespace agq
