// The contract of the attention kernels: softmax(scale * Q K^T + bias) V for a block of tokens of one key/value head.
//
// A kernel never allocates or starts threads. Kernels differ in the order of sums and in the operand type of the two
// products: binary32, or 16-bit integers with scales, which are more precise than the cache's binary16 unless one
// channel of a vector is much larger than all others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention_few.h"
#include "kernels/softmax_weights.h"

namespace agq {

constexpr int attention_row_limit = weights_row_limit;  ///< most rows (tokens x query heads) of one call
constexpr int attention_head_limit = 1024;              ///< longest query and key vector

/// Row r = t * group + g is query head g of the group at token t, for t < n_tokens, g < group.
struct attention_args {
    int n_tokens;
    int group;       ///< query heads that share the key/value head
    int head_qk;     ///< length of query and key vectors, at most attention_head_limit
    int head_v;      ///< length of value and output vectors, a multiple of 16
    const float *q;  ///< [rows][head_qk], already scaled
    int64_t n_keys;
    /// Blocks of 64 keys, and their values, as packed by the kernel, one after another.
    const void *keys;
    const void *values;
    /// Added to the scores of (token t, key k), after multiplication by the head's slope. Row t begins at mask + t *
    /// mask_stride (bytes); elements are binary16 or binary32, and not NaN. -inf hides a key. Null: nothing is hidden.
    const char *mask;
    size_t mask_stride;
    bool mask_is_f16;
    const float *slopes;  ///< [group]
    float soft_cap;       ///< c: scores become c * tanh(score / c) before the mask; 0: none
    const float *sinks;   ///< [group] scores of a key without a value, or null
    /// Output of (token t, head g) goes to out + t * out_token_stride + g * out_head_stride (floats), head_v floats.
    float *out;
    int64_t out_token_stride, out_head_stride;
    void *scratch;  ///< scratch_bytes(head_qk, head_v), aligned to 64 bytes
};

/// Keys, values and scratch are aligned to 64 bytes, and all sizes are multiples of 64.
struct attention_kernel {
    size_t (*key_bytes)(int head_qk);   ///< size of a packed block of keys
    size_t (*value_bytes)(int head_v);  ///< size of a packed block of values
    size_t (*scratch_bytes)(int head_qk, int head_v);
    /// Pack keys [n][head_qk] or values [n][head_v]; if n < 64, the rest of the block becomes zero.
    void (*pack_keys)(const float *rows, int n, int head_qk, void *packed);
    void (*pack_values)(const float *rows, int n, int head_v, void *packed);
    /// n_tokens * group must not exceed attention_row_limit. A row whose keys are all hidden becomes 0. If a row, or a
    /// key or value that it sees, is not finite, the results that depend on it become NaN.
    void (*attend)(const attention_args &args);
    void (*f16_to_f32)(const uint16_t *from, float *to, int64_t n);
    softmax_weights_fn weights;  ///< of this instruction set, in binary32
    const few_kernel *few;       ///< for few rows, likewise; null: all lengths are packed
};

#ifdef __GNUC__
#define AGQ_ATTENTION(name) &name
#else
#define AGQ_ATTENTION(name) nullptr  // without vector types there is no kernel
#endif

extern const attention_kernel attention_paper;             ///< queries, keys, values in 8 bits, softmax in 4
extern const attention_kernel attention_paper_normalized;  ///< the same, with weights that add up to 1

}  // namespace agq
