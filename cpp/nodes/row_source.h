// What the host computes on rows of activations before a matrix product: residual addition, norm, gated unit. Here it
// is computed while the product's input is quantized.
#pragma once

#include <atomic>

#include "base/thread_memory.h"
#include "host/host.h"
#include "kernels/rows.h"
#include "nodes/custom_node.h"

namespace agq {

/// How to compute a row of the tensor that products read. All tensors are binary32 with contiguous rows.
struct row_source {
    enum class operation { layer_norm, rms_norm, swiglu, swiglu_oai };

    /// ADD_ID: adds the bias of the expert to an input of the gated unit. The sum is always written to memory.
    struct expert_bias {
        const ggml_tensor *x = nullptr;  ///< null: there is no bias
        const ggml_tensor *bias = nullptr, *ids = nullptr;
    };

    operation what = operation::rms_norm;
    const ggml_tensor *addends[2] = {nullptr, nullptr};  ///< operands of `sum`, or null
    const ggml_tensor *sum = nullptr;     ///< the norm's input if it is computed here too; always written to memory
    const ggml_tensor *x = nullptr;       ///< input of the norm, or the gate
    const ggml_tensor *up = nullptr;      ///< other input of the gated unit; null: x holds both, as halves of each row
    expert_bias gate_bias, up_bias;       ///< what is computed to get x and up
    float alpha = 0, limit = 0;           ///< of swiglu_oai
    bool swapped = false;                 ///< with halves: the gate is the second half
    const ggml_tensor *weight = nullptr;  ///< of the norm, one row
    const ggml_tensor *bias = nullptr;    ///< one row, or null
    float eps = 0;
    const ggml_tensor *result = nullptr;
    bool written = false;  ///< whether other nodes need the result in memory

    /// Computes row `row` of the result, counted through all dimensions. Writes it to `to`, and to memory where needed.
    void compute(const row_kernel &kern, int64_t row, float *to) const;
};

/// All rows of a source, written to memory.
struct source_rows {
    const row_source *source = nullptr;
    const row_kernel *kern = nullptr;
    const thread_memory *memory = nullptr;  ///< thread_bytes() in each thread
    std::atomic<int64_t> next{0};

    size_t thread_bytes() const;
};

/// Function of the custom node; `userdata` is a source_rows.
void source_rows_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node compute_rows{source_rows_node, true};
}  // namespace node

}  // namespace agq
