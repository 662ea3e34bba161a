// What the host computes on rows of activations before a matrix product: residual addition, norm, gated unit. Here it
// is computed while the product's input is quantized.
#pragma once

#include "host/host.h"
#include "kernels/rows.h"

namespace agq {

/// How to compute a row of the tensor that products read. All tensors are binary32 with contiguous rows.
struct row_source {
    enum class operation { layer_norm, rms_norm, swiglu };

    operation what = operation::rms_norm;
    const ggml_tensor *addends[2] = {nullptr, nullptr};  ///< operands of `sum`, or null
    const ggml_tensor *sum = nullptr;     ///< the norm's input if it is computed here too; always written to memory
    const ggml_tensor *x = nullptr;       ///< input of the norm, or the gate
    const ggml_tensor *up = nullptr;      ///< other input of the gated unit; null: x holds both, as halves of each row
    bool swapped = false;                 ///< with halves: the gate is the second half
    const ggml_tensor *weight = nullptr;  ///< of the norm, one row
    const ggml_tensor *bias = nullptr;    ///< one row, or null
    float eps = 0;
    const ggml_tensor *result = nullptr;
    bool written = false;  ///< whether other nodes need the result in memory

    /// Computes row `row` of the result, counted through all dimensions. Writes it to `to`, and to memory where needed.
    void compute(const row_kernel &kern, int64_t row, float *to) const;
};

}  // namespace agq
