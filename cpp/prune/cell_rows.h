// The keys and values of single cells in the cache of one layer, for copies between caches of the same shape.
#pragma once

#include <cstddef>
#include <cstdint>

#include "graph/graph_facts.h"

namespace agq {

/// One stream of a layer's cache. A cell's record is its row of keys, then its values.
class cell_rows {
  public:
    /// A stream of the cache that an attention of this graph reads. If its values were not found, the result
    /// is not usable.
    static cell_rows of(const graph_facts &facts, const attention_site &site, int64_t stream);
    bool is_usable() const { return values_ != nullptr; }
    /// The same shape in other memory.
    cell_rows at(char *keys, char *values) const;

    size_t key_bytes() const { return key_bytes_; }
    size_t bytes() const { return key_bytes_ + value_bytes_ * static_cast<size_t>(value_pieces_); }
    const char *keys(int64_t cell) const { return keys_ + static_cast<size_t>(cell) * key_stride_; }
    void read(int64_t cell, char *record) const;
    void write(int64_t cell, const char *record) const;

  private:
    char *values(int64_t cell) const { return values_ + static_cast<size_t>(cell) * cell_stride_; }

    char *keys_ = nullptr, *values_ = nullptr;
    size_t key_bytes_ = 0, key_stride_ = 0;
    // Values of a cell stand side by side, or each in a row of its own if they are stored transposed.
    size_t value_bytes_ = 0, cell_stride_ = 0, piece_stride_ = 0;
    int64_t value_pieces_ = 0;
};

}  // namespace agq
