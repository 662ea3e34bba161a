// The contract of attention for few rows (generation, speculative batches). Its speed is limited by reading the cache:
// keys and values are read once, as floats, 64 at a time, and nothing is packed.
//
// Everything is binary32; kernels differ only in the order of sums. They never allocate or start threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/softmax_weights.h"

namespace agq {

/// Query and key vectors are padded with zeros to a multiple of this.
constexpr int few_width_step = 16;

/// Row r = t * group + g is query head g of the group at token t, for t < n_tokens, g < group; at most
/// weights_row_limit rows.
struct few_args {
    int n_tokens, group;
    int width;       ///< of query and key vectors, padded to a multiple of few_width_step
    int head_v;      ///< of value and output vectors, a multiple of 16
    const float *q;  ///< [rows][width], already scaled
    int64_t n_keys;
    /// Same as in attention_args.
    const char *mask;
    size_t mask_stride;
    bool mask_is_f16;
    const float *slopes;
    float soft_cap;
    /// Running softmax: sums of weights * values, largest score so far, and sums of weights. Initialize to 0, -inf and
    /// 0.
    float *out;      ///< [rows][head_v]
    float *maximum;  ///< [rows]
    float *sum;      ///< [rows]
    float *masks;    ///< scratch [n_tokens][64]
    float *scores;   ///< scratch [rows][64]
};

/// A block of up to 64 keys.
struct few_block {
    int begin, end;       ///< tokens that see one of its keys are in this range
    int n;                ///< number of keys
    const float *keys;    ///< [64][width], zeros after the last key
    const float *values;  ///< [n][head_v] or, transposed, [head_v][64] with zeros after the last key
    bool transposed;
};

struct few_kernel {
    /// Reads the masks of the block of keys that begins at `first` into args.masks, and sets `begin` and `end`.
    void (*read_masks)(const few_args &args, int64_t first, few_block *block);
    /// Processes a block whose masks have been read.
    void (*attend)(const few_args &args, const few_block &block);
    /// Converts n rows of binary16, `stride` bytes apart, to floats, `to_stride` floats apart. Prefetches the rows that
    /// are `ahead` bytes further into the second-level cache.
    void (*read_f16)(const char *from, size_t stride, int n, int width, float *to, int64_t to_stride, int64_t ahead);
};

}  // namespace agq
