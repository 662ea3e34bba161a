// The contract of the kernels that compute only softmax(scale * Q K^T + bias), for a block of tokens of one key/value
// head. The importance of tokens is computed from it. All floats are binary32; kernels differ only in the order of
// sums. A kernel never allocates or starts threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace agq {

constexpr int attention_keys = 64;     ///< keys of a packed block
constexpr int weights_row_limit = 96;  ///< most rows (tokens x query heads) of one call

/// Row r = t * group + g is query head g of the group at token t, for t < n_tokens, g < group.
struct softmax_weights_args {
    int n_tokens;
    int group;       ///< query heads that share the key head
    int head;        ///< length of query and key vectors; any length
    const float *q;  ///< [rows][head], already scaled
    int64_t n_keys;
    const float *keys;  ///< blocks of 64 keys, channels first: [block][head][64], the last one padded with zeros
    /// Added to the scores of (token t, key k), after multiplication by the head's slope. Row t begins at mask + t *
    /// mask_stride (bytes); elements are binary16 or binary32. -inf hides a key.
    const char *mask;
    size_t mask_stride;
    bool mask_is_f16;
    const float *slopes;  ///< [group]
    float soft_cap;       ///< c: scores become c * tanh(score / c) before the mask; 0: none
    const float *sinks;   ///< [group] scores of a key without a value, or null
    /// Output: row r, key k at weights[r * stride + k]; `stride` is n_keys rounded up to a multiple of 64, or more.
    float *weights;
    int64_t stride;
};

/// n_tokens * group must not exceed weights_row_limit. A row whose keys are all hidden becomes 0.
using softmax_weights_fn = void (*)(const softmax_weights_args &args);

}  // namespace agq
