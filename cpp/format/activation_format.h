// The format that a weight matrix expects of its activations.
#pragma once

#include <cstdint>

namespace agq {

/// How activations are quantized. The weight matrix that they are multiplied with sets the parameters.
struct activation_format {
    int k;                          ///< columns, a multiple of 64
    int bits;                       ///< 8 or 4: values are clamped to +-127 or +-7
    bool per_group;                 ///< one scale per (token, group of 64) instead of one per token
    const uint8_t *exponents;       ///< [k / 64] refinement exponents, 0..15
    const uint16_t *listed;         ///< channels stored first, in this order; null if n_listed == 0
    const uint16_t *listed_sorted;  ///< the same channels in ascending order
    int n_listed;
    bool rotated = false;  ///< groups are rotated (rotation.h) after refinement; needs per_group
};

}  // namespace agq
