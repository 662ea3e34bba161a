// Recognizes attention in a graph, in both forms that hosts build: one flash node, or the chain of product, soft-max
// and product.
#pragma once

#include "host/host.h"

namespace agq {

/// What an attention computes its weights from.
struct attention_operands {
    /// [head, token, query head, stream] and [head, key, kv head, stream]
    const ggml_tensor *q = nullptr, *k = nullptr;
    const ggml_tensor *mask = nullptr, *sinks = nullptr;  ///< or null
    float scale = 1, max_bias = 0, soft_cap = 0;
};

struct attention_pattern : attention_operands {
    const ggml_tensor *scores = nullptr;  ///< the node that reads queries and keys: the flash node, or their product
    int mask_slot = 0;                    ///< which source of the matched node the mask is
    bool plain = false;  ///< whether there is nothing between product and soft-max, so that q and k tell the weights
};

/// Matches the node that takes the mask: a flash node, or the soft-max of a chain. Returns false if it is neither.
bool match_attention(const ggml_tensor *node, attention_pattern *found);

/// The soft-max of a chain that ends in this product with the values, or null.
const ggml_tensor *soft_max_before(const ggml_tensor *output);

}  // namespace agq
