// The choice of experts: the highest scores of each token, and the weights of their experts.
#pragma once

#include <atomic>

#include "host/host.h"
#include "nodes/custom_node.h"

namespace agq {

/// What is read and written.
struct expert_choice_tensors {
    const ggml_tensor *scores = nullptr;   ///< [experts, tokens]
    const ggml_tensor *sorted = nullptr;   ///< [experts, tokens], numbers of experts; only the chosen ones are in order
    const ggml_tensor *ids = nullptr;      ///< [chosen, tokens], the first ones of `sorted`
    const ggml_tensor *values = nullptr;   ///< [1, experts, tokens]
    const ggml_tensor *weights = nullptr;  ///< [1, chosen, tokens], their values

    // The weights divided by their sum, or null.
    const ggml_tensor *sum = nullptr;      ///< [1, tokens]
    const ggml_tensor *clamped = nullptr;  ///< [1, tokens], the sum within the limits
    const ggml_tensor *shares = nullptr;   ///< [chosen, tokens]
};

/// All results are written to memory: what the host's nodes would write, but for the order of experts not chosen.
struct expert_choice : expert_choice_tensors {
    static constexpr int most = 64;  ///< chosen experts

    float least = 0, greatest = 0;  ///< limits of the sum
    std::atomic<int64_t> next{0};
};

/// Function of the custom node; `userdata` is an expert_choice.
void expert_choice_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node choose_experts{expert_choice_node, false};
}  // namespace node

}  // namespace agq
