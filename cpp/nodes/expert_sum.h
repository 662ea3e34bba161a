// The end of a mixture of experts: the outputs of a token's experts are weighed and added.
#pragma once

#include <atomic>

#include "host/host.h"
#include "kernels/rows.h"
#include "nodes/custom_node.h"

namespace agq {

/// What is read and written, but for the result.
struct expert_sum_tensors {
    const ggml_tensor *outputs = nullptr;   ///< [columns, experts of a token, tokens]
    const ggml_tensor *bias = nullptr;      ///< [columns, experts], or null
    const ggml_tensor *ids = nullptr;       ///< [experts of a token, tokens], for the bias
    const ggml_tensor *weights = nullptr;   ///< [1, experts of a token, tokens]
    const ggml_tensor *weighted = nullptr;  ///< where the weighed outputs go, or null
};

struct expert_sum : expert_sum_tensors {
    static constexpr int most = 64;  ///< experts of a token

    const ggml_tensor *result = nullptr;  ///< [columns, tokens]
    const row_kernel *kern = nullptr;
    std::atomic<int64_t> next{0};
};

/// Function of the custom node; `userdata` is an expert_sum.
void expert_sum_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node add_experts{expert_sum_node, true};
}  // namespace node

}  // namespace agq
