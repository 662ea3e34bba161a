// Dropped tokens, as the K/V cache remembers them: a row of keys that is all zeros in a layer means that the token of
// this cell is not there in this layer, nor in any later one.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "host/host.h"

namespace agq {

/// Rows of keys of one layer: cell c of stream s begins at base + s * stream_stride + c * row_stride.
struct key_rows {
    const char *base = nullptr;
    size_t row_stride = 0, row_bytes = 0, stream_stride = 0;
    int type = 0;
    int64_t row_length = 0;  ///< elements
    uint64_t magnitude = 0;  ///< the bits of eight bytes of a row that say whether its elements are zero
    int head_words = 1;      ///< how many times eight bytes a first look takes

    /// `k` is the view that attention takes, [head, cell, kv head, stream].
    static key_rows of(const ggml_tensor *k);
    const char *row(int64_t cell, int64_t stream) const {
        return base + static_cast<size_t>(stream) * stream_stride + static_cast<size_t>(cell) * row_stride;
    }
    /// Whether all elements are zero, of whatever sign.
    bool is_zero(int64_t cell, int64_t stream) const;
    /// A look at the first bytes only: false is certain.
    bool may_be_zero(int64_t cell, int64_t stream) const {
        const char *p = row(cell, stream);
        uint64_t word;
        std::memcpy(&word, p, sizeof(word));
        if (word & magnitude) return false;
        for (int i = 1; i < head_words; ++i) {
            std::memcpy(&word, p + sizeof(word) * static_cast<size_t>(i), sizeof(word));
            if (word & magnitude) return false;
        }
        return true;
    }
};

/// A cell whose token was dropped.
struct dropped_cell {
    int32_t stream, cell;
    int32_t first_layer;  ///< index of the first layer, among those given, in which it is not there
};

/// Looks for dropped tokens in the cache. It keeps no state that could grow stale (cells are restored, copied, moved
/// and used again behind the plugin's back), only hints. That a cell holds a dropped token, or does not, is read anew
/// each time. The layer from which on it is missing takes a second row; in a step that only adds a token to what was
/// there, that row is read for one cell in eight, and for all as soon as one of these is not as it was.
class zero_row_scanner {
  public:
    /// All dropped cells that a row of `mask` ([cell, token, 1, stream]) can see, by stream and cell. `layers` ascend.
    /// Cells for which `skip[stream * cells + cell]` is set are left out; it may be empty. Throws std::bad_alloc.
    const std::vector<dropped_cell> &scan(const std::vector<key_rows> &layers, const ggml_tensor *mask,
                                          const std::vector<uint8_t> &skip);

  private:
    static bool is_border(const std::vector<key_rows> &layers, int64_t cell, int64_t stream, int32_t layer);
    static int32_t find_border(const std::vector<key_rows> &layers, int64_t cell, int64_t stream);
    void prefetch_rows(const std::vector<key_rows> &layers, int64_t cell, int64_t stream, int32_t hint,
                       bool both) const;
    bool is_one_step_on(const std::vector<key_rows> &layers);
    bool scan_stream(const std::vector<key_rows> &layers, const ggml_tensor *mask, int64_t stream, bool sampled);

    std::vector<dropped_cell> found_;
    std::vector<int32_t> hints_;  ///< first_layer by stream and cell, as it was last time; -1: not dropped
    int64_t hinted_cells_ = 0;
    std::vector<int32_t> candidates_;  ///< cells of a stream that are looked at
    std::vector<int32_t> last_candidates_;
    size_t last_layers_ = 0;
    const char *last_base_ = nullptr;
    int32_t turn_ = 0;
};

}  // namespace agq
