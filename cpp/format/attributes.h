// Checks the attribute stream of an AGQ4 matrix and unpacks it for the kernels (docs/format.md, "Attribute stream").
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "format/activation_format.h"
#include "format/blocks.h"

namespace agq {

/// A query head of the model, counted from 0 in its layer.
struct attention_head {
    int layer, head;

    bool operator==(const attention_head &o) const { return layer == o.layer && head == o.head; }
    bool operator<(const attention_head &o) const { return layer != o.layer ? layer < o.layer : head < o.head; }
};

/// What the score `heads` looks at.
struct head_choice {
    std::vector<attention_head> heads;
    bool all = false;       ///< all heads of the pruning layer, instead of a list; not in files
    int tail = no_overlap;  ///< tokens behind the question at the end of a prompt, or no_overlap

    static constexpr int no_overlap = -1;  ///< the words of the question do not count
    bool empty() const { return heads.empty() && !all; }
};

/// Runtime parameters of one M x K matrix. `format` points into this object, so the object must not be copied or moved.
struct matrix_attributes {
    int64_t rows;
    attribute_header header;
    uint8_t codebook[16];
    std::vector<uint8_t> exponents;       ///< [K / 64]
    std::vector<uint16_t> listed;         ///< channels stored first, in stored order
    std::vector<uint16_t> listed_sorted;  ///< the same, ascending
    bool prunes = false;                  ///< whether there is a pruning record
    uint8_t prune_score = 0;              ///< 0 first, 1 received, 2 recent, 3 learned, 4 heads
    float prune_threshold = 0;
    uint8_t prune_keep = 0;              ///< the last `prune_keep` tokens of a ubatch stay
    uint8_t prune_reach = 0;             ///< each token gets the highest importance within this many places
    bool prune_reuse = false;            ///< later layers still get keys and values of dropped tokens
    head_choice prune_heads;             ///< of the score `heads`
    std::vector<float> prune_direction;  ///< of a learned score: the weights of a token's state
    activation_format format;

    matrix_attributes() = default;
    matrix_attributes(const matrix_attributes &) = delete;
    matrix_attributes &operator=(const matrix_attributes &) = delete;

    /// Whether activations quantized for `other` also fit this matrix.
    bool same_activations(const matrix_attributes &other) const;
};

/// Size in bytes of the attribute stream of a matrix of `m` rows and `k` columns (a multiple of 64).
size_t stream_bytes(int64_t m, int64_t k);

/// Size in bytes of such a matrix. If `m` is a multiple of 16, the first `m` rows of a larger matrix have the same
/// size.
size_t matrix_bytes(int64_t m, int64_t k);

/// Matrix number i of a tensor of such matrices (3-D tensors hold several).
inline const tile *matrix_at(const void *tensor, int64_t i, int64_t m, int64_t k) {
    return reinterpret_cast<const tile *>(static_cast<const uint8_t *>(tensor) +
                                          static_cast<size_t>(i) * matrix_bytes(m, k));
}

/// Whether the format supports this shape.
inline bool is_shape(int64_t m, int64_t k) {
    return m > 0 && k > 0 && k % group_columns == 0 && k <= INT32_MAX;
}

/// Reads the first 16 bytes of the stream; all zero if it is shorter.
attribute_header read_header(const tile *tiles, int64_t m, int64_t k);

/// Parses and checks the stream of a matrix of `m` >= 1 rows and `k` >= 64 columns (a multiple of 64). Never reads past
/// the matrix, whatever its content. If the stream is not valid, returns null and sets `*error` to a message.
std::shared_ptr<const matrix_attributes> parse_attributes(const tile *tiles, int64_t m, int64_t k, std::string *error);

/// Reads the direction of a learned score: factor, count, zero, then one signed byte per channel. Returns false if the
/// `size` bytes are not exactly a valid direction.
bool parse_direction(const uint8_t *bytes, size_t size, std::vector<float> *direction);

/// Pads the last panel of a matrix to 16 rows, as the kernels take it, if `m` is not a multiple of 16. `out` gets k /
/// 64 * sizeof(half_tile) bytes. The missing rows and the attributes are zero.
void expand_last_panel(const tile *tiles, int64_t m, int64_t k, tile *out);

/// Dequantizes row `row` of the matrix into `out` (`format.k` floats, input channels in their original order).
void dequantize_row(const matrix_attributes &attributes, const tile *tiles, int64_t row, float *out);

}  // namespace agq
