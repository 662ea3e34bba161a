// Which hidden cells hold tokens that wait for their question.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/graph_facts.h"
#include "prune/zero_rows.h"

namespace agq {

/// Reads the marks of deferred tokens. Each is a row of its own in memory, so a scan of the same hidden cells as the
/// last one reads one mark in eight if there are many, and all as soon as one of them has changed.
class deferred_cells {
  public:
    /// The deferred ones of `hidden`, which are cells of the only kind of attention. Throws std::bad_alloc.
    const std::vector<int32_t> &find(const graph_facts &facts, const std::vector<dropped_cell> &hidden);
    /// The marks have been changed: the next scan reads all.
    void forget() {
        last_.clear();
        found_.clear();
    }

  private:
    bool is_as_before(const graph_facts &facts, const std::vector<dropped_cell> &hidden);
    void read_all(const graph_facts &facts, const std::vector<dropped_cell> &hidden);

    std::vector<int32_t> found_;
    std::vector<dropped_cell> last_;  ///< the hidden cells of the last scan
    std::vector<uint8_t> is_marked_;  ///< which of them are deferred
    const void *last_cache_ = nullptr;
    size_t turn_ = 0;
};

}  // namespace agq
