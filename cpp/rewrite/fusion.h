// When a row source (residual addition, norm, gated unit) may be computed while a product's input is quantized instead
// of in nodes of its own.
#pragma once

#include <functional>
#include <vector>

#include "nodes/row_source.h"

namespace agq {

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
