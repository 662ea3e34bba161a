// What the host computes on rows of activations in front of a matrix product (residual addition, norm, gated unit), and
// when it may be computed while the product's input is quantized instead of in nodes of its own.
#pragma once

#include <functional>
#include <vector>

#include "host.h"
#include "kernels/rows.h"

namespace agq {

/// How to compute a row of the tensor that products read. Tensors are binary32 with contiguous rows.
struct row_source {
    enum class operation { layer_norm, rms_norm, swiglu };

    operation what = operation::rms_norm;
    const ggml_tensor *addends[2] = {nullptr, nullptr};  ///< of `sum`, or null
    const ggml_tensor *sum = nullptr;     ///< the norm's input if it is computed here too; it is always written
    const ggml_tensor *x = nullptr;       ///< input of the norm, or the gate
    const ggml_tensor *up = nullptr;      ///< other input of the gated unit; null: both are halves of the rows of x
    bool swapped = false;                 ///< with halves: the gate is the second one
    const ggml_tensor *weight = nullptr;  ///< of the norm, one row
    const ggml_tensor *bias = nullptr;    ///< one row, or null
    float eps = 0;
    const ggml_tensor *result = nullptr;
    bool written = false;  ///< whether others need the result in memory

    /// Row number `row` of the result, counted through all dimensions, to `to` and to where it must be written.
    void compute(const row_kernel &kern, int64_t row, float *to) const;
};

/// Some nodes that a row source replaces, and the products that read it.
struct fusion {
    row_source source;
    std::vector<int> replaced;  ///< indices of nodes, ascending; the source is computed in place of the last one
    std::vector<int> products;
};

/// What can be fused in front of the products `is_product` (by index of node). `same_format(i, j)` says whether
/// products i and j want the same quantized activations if they have the same input. Nodes of the same graph may follow
/// in another call: a result is kept out of memory only if the memory is seen to be used again.
std::vector<fusion> find_fusions(ggml_tensor **nodes, int n, const std::vector<bool> &is_product,
                                 const std::function<bool(int, int)> &same_format);

}  // namespace agq
