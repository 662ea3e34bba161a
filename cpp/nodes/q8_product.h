// Matrix products with Q8_0 weights as ggml custom nodes: pack tokens, multiply.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/thread_memory.h"
#include "host/host.h"
#include "kernels/q8.h"
#include "nodes/custom_node.h"

namespace agq {

/// Whether the nodes below can compute the product: one matrix for all tokens, or one for each head.
bool is_q8_product(const ggml_tensor *node);

struct q8_product {
    const ggml_tensor *node = nullptr;
    const q8_kernel *kern = nullptr;
    const thread_memory *packed = nullptr;  ///< packed_bytes(), shared by all threads
    const thread_memory *memory = nullptr;  ///< thread_bytes() in each thread
    std::atomic<int64_t> next_token{0}, next_rows{0};

    int64_t tokens() const;
    size_t packed_bytes() const;
    size_t thread_bytes() const;
};

// Functions of the custom nodes. `userdata` is a q8_product.
void q8_pack_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void q8_multiply_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node q8_pack{q8_pack_node, false}, q8_multiply{q8_multiply_node, true};
}  // namespace node

}  // namespace agq
