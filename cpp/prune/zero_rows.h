// Finds dropped tokens in the K/V cache. If a row of keys is all zeros in a layer, that cell's token was dropped before
// this layer and is missing in the caches of all later ones.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "host/host.h"

namespace agq {

/// Rows of keys in one layer: cell c of stream s begins at base + s * stream_stride + c * row_stride.
struct key_rows {
    const char *base = nullptr;
    size_t row_stride = 0, row_bytes = 0, stream_stride = 0;
    int type = 0;
    int64_t row_length = 0;  ///< elements
    uint64_t magnitude = 0;  ///< mask for eight bytes of a row: the bits that are set if elements are not zero
    int head_words = 1;      ///< how many groups of eight bytes the quick check reads

    /// `k` is the view that attention reads, [head, cell, kv head, stream].
    static key_rows of(const ggml_tensor *k);
    const char *row(int64_t cell, int64_t stream) const {
        return base + static_cast<size_t>(stream) * stream_stride + static_cast<size_t>(cell) * row_stride;
    }
    /// Whether all elements are zero, of either sign.
    bool is_zero(int64_t cell, int64_t stream) const;
    /// Quick check of the first bytes: if false, the row is certainly not zero.
    bool may_be_zero(int64_t cell, int64_t stream) const { return begins_with_zeros(row(cell, stream)); }
    /// The same of a row at `p`.
    bool begins_with_zeros(const char *p) const {
        uint64_t any = 0;
        for (int i = 0; i < head_words; ++i) {
            uint64_t word;
            std::memcpy(&word, p + sizeof(word) * static_cast<size_t>(i), sizeof(word));
            any |= word & magnitude;
        }
        return any == 0;
    }
};

/// A cell whose token was dropped.
struct dropped_cell {
    int32_t stream, cell;
    int32_t first_layer;  ///< index into the given layers: the first layer without the token
};

/// What the last scan has read, to be read again. Rows are of a cache's only stream.
class watched_rows {
  public:
    void clear();
    /// Adds the row in which a token is missing first (`hint`: the layer) and the one before, or, if it is missing
    /// nowhere (-1), the one of the last layer.
    void add(const std::vector<key_rows> &layers, int64_t cell, int32_t hint);
    /// Whether all rows still look as they did. Of the rows before, one in eight is read: those of this `turn`.
    bool are_as_before(const key_rows &form, size_t turn) const;

  private:
    std::vector<const char *> filled_, zero_, before_;
};

/// Scans the cache for dropped tokens. The host may restore, copy, move and reuse cells at any time, so what is
/// kept of a scan is read again, or but a hint. Each scan reads again whether a cell holds a dropped token. A second
/// row is read to find the layer from which it is missing. If a scan only adds one token, that row is read for one cell
/// in eight; if one has changed, it is read for all.
class zero_row_scanner {
  public:
    /// All dropped cells that are visible in `mask` ([cell, token, 1, stream]), by stream and cell. `layers` are
    /// ascending, and at least one. Skips cells for which `skip[stream * cells + cell]` is set; `skip` may be empty.
    /// `least_layer`: the first layer from which a token can be missing; cells that are zero before it are empty.
    /// Throws std::bad_alloc.
    const std::vector<dropped_cell> &scan(const std::vector<key_rows> &layers, const ggml_tensor *mask,
                                          const std::vector<uint8_t> &skip, int32_t least_layer);
    /// Whether the last scan found what the one before had found.
    bool is_unchanged() const { return unchanged_; }

  private:
    static bool is_border(const std::vector<key_rows> &layers, int64_t cell, int64_t stream, int32_t layer);
    static int32_t find_border(const std::vector<key_rows> &layers, int64_t cell, int64_t stream);
    static void prefetch_rows(const std::vector<key_rows> &layers, int64_t cell, int64_t stream, int32_t hint);
    void list_candidates(const ggml_tensor *mask, int64_t stream, const uint8_t *skipped);
    const int32_t *one_step_on(const std::vector<key_rows> &layers);
    bool is_as_before(const std::vector<key_rows> &layers, int32_t *hints, int32_t least_layer, bool was_watching);
    void scan_stream(const std::vector<key_rows> &layers, const ggml_tensor *mask, int64_t stream, int32_t least_layer,
                     int32_t *hints);

    std::vector<dropped_cell> found_;
    std::vector<int32_t> hints_;  ///< first_layer by stream and cell in the last scan; -1: not dropped
    int64_t hinted_cells_ = 0;
    std::vector<int32_t> candidates_;  ///< cells of a stream to check
    std::vector<int32_t> last_candidates_;
    std::vector<uint8_t> seen_;  ///< by cell, as long as candidates are listed
    size_t last_layers_ = 0;
    const char *last_base_ = nullptr;
    int32_t last_least_layer_ = 0;
    watched_rows watched_;
    bool is_watching_ = false;  ///< whether the last scan was of one token, and `watched_` holds its candidates
    bool unchanged_ = false;
    size_t turn_ = 0;
};

}  // namespace agq
