// Matrix products on AGQ4 weights as ggml custom nodes, and row look-up.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/thread_memory.h"
#include "host/host.h"
#include "nodes/activation_set.h"
#include "nodes/custom_node.h"

namespace agq {

/// One or several weight tensors times an activation set. Together, they have one barrier, and threads wait once for
/// the last unit of work.
struct product {
    struct part {
        const ggml_tensor *weights;
        const tensor_attributes *attributes;
        const ggml_tensor *result;  ///< only its data and strides are used
    };

    activation_set *set = nullptr;
    std::vector<part> parts;
    const thread_memory *memory = nullptr;  ///< thread_bytes() in each thread
    std::atomic<int64_t> next{0};

    size_t thread_bytes() const;
};

/// Look-up of rows of an AGQ4 tensor by number.
struct row_lookup {
    const ggml_tensor *weights = nullptr;
    const tensor_attributes *attributes = nullptr;
};

// Functions of the custom nodes. `userdata` is a product, or a row_lookup. A product node writes to the results of its
// parts. A row_lookup node reads row numbers from dst->src[0] and its tensor from dst->src[1].
void product_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void row_lookup_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node multiply{product_node, true}, look_up_rows{row_lookup_node, true};
}  // namespace node

}  // namespace agq
