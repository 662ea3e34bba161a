// Reads the mask of an attention: [cell, token, 1, stream], binary16 or binary32; -inf hides a cell from a token.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "host/host.h"

namespace agq {

constexpr uint16_t hidden_f16 = 0xFC00;
constexpr int64_t mask_rows_ahead = 16;  ///< how far in front a row is prefetched: each may begin in another page

/// The mask row of one token.
class mask_row {
  public:
    mask_row(const ggml_tensor *mask, int64_t token, int64_t stream)
        : mask_row(static_cast<const char *>(mask->data) + static_cast<size_t>(stream) * mask->nb[3] +
                       static_cast<size_t>(token) * mask->nb[1],
                   mask->type == ggml_type_f16) {}
    mask_row(const char *row, bool is_f16) : row_(row), is_f16_(is_f16) {}

    /// Where the entry of a cell is.
    const char *at(int64_t cell) const {
        return row_ + static_cast<size_t>(cell) * (is_f16_ ? sizeof(uint16_t) : sizeof(float));
    }
    bool hides(int64_t cell) const {
        if (is_f16_) return reinterpret_cast<const uint16_t *>(row_)[cell] == hidden_f16;
        return reinterpret_cast<const float *>(row_)[cell] == -INFINITY;
    }
    /// The row that begins so many bytes behind this one.
    mask_row after(size_t bytes) const { return {row_ + bytes, is_f16_}; }
    /// Whether a row of the same mask has the same entries from `begin` to `end`.
    bool equals(const mask_row &other, int64_t begin, int64_t end) const {
        return std::memcmp(at(begin), other.at(begin), static_cast<size_t>(at(end) - at(begin))) == 0;
    }
    /// Sets `seen[c]` for every visible cell from `begin` to `end`.
    void mark_visible(int64_t begin, int64_t end, uint8_t *seen) const {
        if (is_f16_) {
            mark_other<uint16_t>(begin, end, hidden_f16, seen);
        } else {
            mark_other<float>(begin, end, -INFINITY, seen);
        }
    }
    /// How many of the first `n` cells are visible.
    int64_t count_visible(int64_t n) const {
        return is_f16_ ? count_other<uint16_t>(n, hidden_f16) : count_other<float>(n, -INFINITY);
    }

  private:
    template <typename Element>
    int64_t count_other(int64_t n, Element hidden) const {
        const Element *row = reinterpret_cast<const Element *>(row_);
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += row[i] != hidden;
        return count;
    }
    template <typename Element>
    void mark_other(int64_t begin, int64_t end, Element hidden, uint8_t *seen) const {
        const Element *row = reinterpret_cast<const Element *>(row_);
        for (int64_t i = begin; i < end; ++i) seen[i] = static_cast<uint8_t>(seen[i] | (row[i] != hidden));
    }

    const char *row_;
    bool is_f16_;
};

/// Writes the numbers of marked cells to `cells`.
inline void list_marked(const std::vector<uint8_t> &marked, std::vector<int32_t> *cells) {
    cells->resize(marked.size());
    int32_t *next = cells->data();
    for (size_t c = 0; c < marked.size(); ++c) {
        *next = static_cast<int32_t>(c);
        next += marked[c] != 0;
    }
    cells->resize(static_cast<size_t>(next - cells->data()));
}

inline bool is_hidden(const ggml_tensor *mask, int64_t cell, int64_t token, int64_t stream) {
    return mask_row(mask, token, stream).hides(cell);
}

}  // namespace agq
