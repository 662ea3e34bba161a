// Layout of a panel: full tiles, then half a tile if the number of groups is odd. The last panel of a matrix may have
// fewer than 16 rows; each field then holds only those rows.
//
// Everything is in an anonymous namespace: each kernel file has its own compiler flags, so the linker must not merge
// the copies.
#pragma once

#include <cstddef>

#include "format/blocks.h"

namespace agq {
namespace {

/// One column group of a panel.
struct stored_group {
    const uint8_t *scale_hi;  ///< [rows]
    const uint8_t *scale_lo;  ///< tile: [rows], nibble `half` of each; half tile: [(rows + 1) / 2], two rows per byte
    const uint8_t *codes;     ///< 8 chunks of 4 * rows bytes
    int rows;
    int half;    ///< which half of the tile: 0 or 1
    bool alone;  ///< whether the group is a half tile

    /// The scale of a row, as the bits of a binary16.
    unsigned scale_bits(int row) const {
        const uint8_t both = scale_lo[alone ? row / 2 : row];
        const unsigned nibble = (alone ? row % 2 : half) == 0 ? both & 15u : both >> 4;
        return static_cast<unsigned>(scale_hi[row]) << 8 | nibble << 4;
    }

    /// The code of (row, column), column < 64.
    int code(int row, int column) const {
        const uint8_t pair = codes[4 * (column / 8 * rows + row) + column % 4];
        return column % 8 < 4 ? pair & 15 : pair >> 4;
    }
};

/// Whether group g is a half tile.
inline bool is_alone(int groups, int g) {
    return g % 2 == 0 && g == groups - 1;
}

/// Group g of a panel of `groups` groups.
inline stored_group group_of(const void *panel, int rows, int groups, int g) {
    const uint8_t *tile =
        static_cast<const uint8_t *>(panel) + static_cast<size_t>(g / 2) * 2 * rows * ggml_block_bytes;
    if (is_alone(groups, g)) return {tile, tile + rows, tile + 2 * rows, rows, 0, true};
    return {tile + g % 2 * rows, tile + 2 * rows, tile + (4 + g % 2 * 32) * rows, rows, g % 2, false};
}

/// The last group of a 16-row panel with an odd number of groups.
inline const half_tile &last_half(const tile *panel, int groups) {
    return *reinterpret_cast<const half_tile *>(panel + groups / 2);
}

/// The 8 chunks of group g of a 16-row panel.
inline const uint8_t (*chunks_of(const tile *panel, int groups, int g))[64] {
    return is_alone(groups, g) ? last_half(panel, groups).codes : panel[g / 2].codes + g % 2 * 8;
}

/// Panel number p, counted from the one at `first`.
inline const tile *panel_at(const tile *first, int p, int groups) {
    const uint8_t *bytes = reinterpret_cast<const uint8_t *>(first);
    return reinterpret_cast<const tile *>(bytes + static_cast<size_t>(p) * groups * sizeof(half_tile));
}

}  // namespace
}  // namespace agq
