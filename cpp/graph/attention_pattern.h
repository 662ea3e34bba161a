// Recognizes attention in a graph, in both forms that hosts build: one flash-attention node, or the chain of product,
// soft-max and product.
#pragma once

#include "host/host.h"

namespace agq {

/// The operands from which attention weights are computed.
struct attention_operands {
    /// [head, token, query head, stream] and [head, key, kv head, stream]
    const ggml_tensor *q = nullptr, *k = nullptr;
    const ggml_tensor *mask = nullptr, *sinks = nullptr;  ///< null if there is none
    float scale = 1, max_bias = 0, soft_cap = 0;
};

struct attention_pattern : attention_operands {
    const ggml_tensor *scores = nullptr;  ///< the node that reads queries and keys: the flash node, or their product
    int mask_slot = 0;                    ///< which source of the matched node is the mask
    bool plain = false;                   ///< whether the soft-max follows the product directly
    bool is_known = false;  ///< whether these operands determine the weights: only a soft cap may be in between
};

/// Matches the node that takes the mask: a flash node, or the soft-max of a chain. Returns false for any other node.
bool match_attention(const ggml_tensor *node, attention_pattern *found);

/// The soft-max of a chain whose last product, with the values, is `output`; null if there is none.
const ggml_tensor *soft_max_before(const ggml_tensor *output);

}  // namespace agq
