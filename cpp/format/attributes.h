// The attribute stream of an AGQ4 matrix: checked, and unpacked into what the kernels take (docs/format.md, "Attribute
// stream").
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "format/activation_format.h"
#include "format/blocks.h"

namespace agq {

/// Runtime parameters of one M x K matrix. `format` points into this object, so it is neither copied nor moved.
struct matrix_attributes {
    int64_t rows;
    attribute_header header;
    uint8_t codebook[16];
    std::vector<uint8_t> exponents;       ///< [K / 64]
    std::vector<uint16_t> listed;         ///< channels that come first, in their order
    std::vector<uint16_t> listed_sorted;  ///< the same, ascending
    bool prunes = false;                  ///< whether there is a pruning record
    uint8_t prune_score = 0;              ///< 0 first, 1 received, 2 recent, 3 learned
    float prune_threshold = 0;
    uint8_t prune_keep = 0;    ///< the last so many tokens of an ubatch stay
    uint8_t prune_reach = 0;   ///< a token counts as much as the most important one at most so many places away
    bool prune_reuse = false;  ///< later layers still get keys and values of dropped tokens
    std::vector<float> prune_direction;  ///< of a learned score: what the state of a token is multiplied with
    activation_format format;

    matrix_attributes() = default;
    matrix_attributes(const matrix_attributes &) = delete;
    matrix_attributes &operator=(const matrix_attributes &) = delete;

    /// Whether activations quantized for `other` can be multiplied with this matrix too.
    bool same_activations(const matrix_attributes &other) const;
};

/// Bytes of the attribute stream of a matrix of `m` rows and `k` columns (a multiple of 64).
size_t stream_bytes(int64_t m, int64_t k);

/// Bytes of such a matrix. The first `m` rows of a larger one take as many if `m` is a multiple of 16.
size_t matrix_bytes(int64_t m, int64_t k);

/// Matrix number i of a tensor of such matrices.
inline const tile *matrix_at(const void *tensor, int64_t i, int64_t m, int64_t k) {
    return reinterpret_cast<const tile *>(static_cast<const uint8_t *>(tensor) +
                                          static_cast<size_t>(i) * matrix_bytes(m, k));
}

/// Whether the format has such matrices, as far as the shape says.
inline bool is_shape(int64_t m, int64_t k) {
    return m > 0 && k > 0 && k % group_columns == 0 && k <= INT32_MAX;
}

/// Reads the first 16 bytes of the stream; all zero if it is shorter.
attribute_header read_header(const tile *tiles, int64_t m, int64_t k);

/// Parses and checks the stream of a matrix of `m` >= 1 rows and `k` >= 64 columns (a multiple of 64). Bytes beyond the
/// matrix are never read, whatever it holds. On a violation of the format returns null and `*error` says which.
std::shared_ptr<const matrix_attributes> parse_attributes(const tile *tiles, int64_t m, int64_t k, std::string *error);

/// Writes the last panel of a matrix whose `m` is not a multiple of 16 as one of 16 rows, as kernels take it, to `out`
/// (k / 64 * sizeof(half_tile) bytes). The rows that are missing, and the attributes, are zero.
void expand_last_panel(const tile *tiles, int64_t m, int64_t k, tile *out);

/// Dequantizes row `row` of the matrix into `out` (`format.k` floats, input channels in their original order).
void dequantize_row(const matrix_attributes &attributes, const tile *tiles, int64_t row, float *out);

}  // namespace agq
