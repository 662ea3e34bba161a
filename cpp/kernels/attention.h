// The contract of the attention kernels: softmax(scale * Q K^T + bias) V for a block of tokens of one key/value head.
//
// A kernel never allocates or starts threads. All floats are binary32; only the order of sums differs between kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace agq {

constexpr int attention_keys = 64;       ///< keys of a packed block
constexpr int attention_row_limit = 96;  ///< most rows (tokens x query heads) of one call

/// Row r = t * group + g is query head g of the group at token t, for t < n_tokens, g < group.
struct attention_args {
    int n_tokens;
    int group;       ///< query heads that share the key/value head
    int head_qk;     ///< length of query and key vectors, any
    int head_v;      ///< length of value and output vectors, a multiple of 16
    const float *q;  ///< [rows][head_qk], scaled already
    int64_t n_keys;
    /// Keys in blocks of 64, channels first: [block][head_qk][64]. Values: [block][64][head_v]. The last block is
    /// filled up with zeros.
    const float *keys;
    const float *values;
    /// Added to the scores of (token t, key k) after multiplication with the slope of the head: row t begins at
    /// mask + t * mask_stride (bytes), elements are binary16 or binary32. -inf hides a key. Null: nothing is hidden.
    const char *mask;
    size_t mask_stride;
    bool mask_is_f16;
    const float *slopes;  ///< [group]
    float soft_cap;       ///< c: scores become c * tanh(score / c) before the mask; 0: none
    const float *sinks;   ///< [group] scores of a key without a value, or null
    /// Output of (token t, head g) goes to out + t * out_token_stride + g * out_head_stride (floats), head_v floats.
    float *out;
    int64_t out_token_stride, out_head_stride;
    float *scratch;  ///< attention_scratch_floats(head_v) floats, aligned to 64 bytes
};

constexpr size_t attention_scratch_floats(int head_v) {
    return static_cast<size_t>(attention_row_limit) * (static_cast<size_t>(head_v) + attention_keys + 4) +
           static_cast<size_t>(attention_row_limit) * attention_keys;
}

struct attention_kernel {
    /// n_tokens * group must not exceed attention_row_limit. A row whose keys are all hidden becomes 0.
    void (*attend)(const attention_args &args);
    void (*f16_to_f32)(const uint16_t *from, float *to, int64_t n);
};

#ifdef __GNUC__
#define AGQ_ATTENTION(name) &name
#else
#define AGQ_ATTENTION(name) nullptr  // no vector types, no kernel
#endif

extern const attention_kernel attention_generic;
extern const attention_kernel attention_avx2;
extern const attention_kernel attention_avx512;
extern const attention_kernel attention_neon;

}  // namespace agq
