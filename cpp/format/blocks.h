// The stored form of AGQ4 as structs: tile, half tile and attribute header, and the constants of the format
// (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace agq {

constexpr int panel_rows = 16;     ///< rows of a panel
constexpr int group_columns = 64;  ///< columns that share a scale: half a tile, the ggml block size
constexpr int code_offset = 64;    ///< a codebook byte u stands for u - 64

/// Layout: one cache line of scales and attributes, then the codes in the order in which the kernels load them. So a
/// mapped file needs no repacking. docs/format.md explains each field.
struct tile {
    uint8_t scale_hi[2][panel_rows];
    uint8_t scale_lo[panel_rows];
    uint8_t attributes[16];
    uint8_t codes[16][64];
};
static_assert(sizeof(tile) == 1088, "a tile is 17 cache lines");

/// The last part of a panel with an odd number of groups.
struct half_tile {
    uint8_t scale_hi[panel_rows];
    uint8_t scale_lo[panel_rows / 2];  ///< row 2 i in the low nibble, row 2 i + 1 in the high nibble
    uint8_t attributes[8];
    uint8_t codes[8][64];
};
static_assert(2 * sizeof(half_tile) == sizeof(tile), "all groups take equally many bytes");

/// First 16 bytes of the attribute stream (little endian).
struct attribute_header {
    uint8_t magic;
    uint8_t version;
    uint8_t activation;  ///< low nibble: bits; high nibble: scale per 0 = token, 1 = group, 2 = rotated group
    uint8_t flags;
    float tensor_scale;
    uint32_t crc32;
    uint32_t length;
};
static_assert(sizeof(attribute_header) == 16, "as in docs/format.md");

constexpr uint8_t attribute_magic = 0xA4;
constexpr uint8_t attribute_version = 1;
constexpr uint8_t flag_channel_order = 1;
constexpr uint8_t flag_pruning = 2;
constexpr int pruning_record_bytes = 8;
constexpr int prune_direction_bytes = 8;  ///< before the numbers of a direction
constexpr uint8_t max_prune_score = 4, prune_score_learned = 3, prune_score_heads = 4;
constexpr int prune_heads_bytes = 4, prune_head_bytes = 4;  ///< before the list of heads, and each of them
constexpr int max_prune_heads = 16, max_prune_tail = 63;
constexpr uint8_t prune_no_overlap = 255;  ///< in place of the tail
constexpr uint8_t max_prune_reach = 15;
constexpr int max_exponent = 15;
/// What shares an activation scale: 0 a token, 1 a group of a token, 2 a rotated group of a token.
constexpr int activation_scale_token = 0, activation_scale_rotated = 2, max_activation_scale = 2;

constexpr int ggml_type_id = 38;
constexpr int ggml_block_size = group_columns;
constexpr int ggml_block_bytes = sizeof(half_tile) / panel_rows;

}  // namespace agq
