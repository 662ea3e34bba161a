// How a weight matrix wants the activations that it is multiplied with.
#pragma once

#include <cstdint>

namespace agq {

/// How activations are quantized; the parameters come from the weight matrix they will be multiplied with.
struct activation_format {
    int k;                     ///< columns, a multiple of 64
    int bits;                  ///< 8 or 4: values are clamped to +-127 or +-7
    bool per_group;            ///< one scale per (token, group of 64) instead of one per token
    const uint8_t *exponents;  ///< [k / 64] refinement exponents, 0..15
    const uint16_t *listed;    ///< channels that come first in the stored order, in this order; null if n_listed == 0
    const uint16_t *listed_sorted;  ///< the same channels ascending
    int n_listed;
    bool rotated = false;  ///< groups are rotated (rotation.h) after their refinement; only with per_group
};

}  // namespace agq
