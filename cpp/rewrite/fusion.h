// Decides when a row source (residual addition, norm, gated unit) may be computed while a product's input is quantized,
// instead of in separate nodes.
#pragma once

#include <functional>
#include <vector>

#include "nodes/row_source.h"

namespace agq {

/// Nodes that a row source replaces, and the products that read it.
struct fusion {
    row_source source;
    std::vector<int> replaced;  ///< indices of nodes, ascending; the last one is computed by the source
    std::vector<int> products;
};

/// Finds what can be fused before the products `is_product` (by node index). `same_format(i, j)`: whether products i
/// and j, given the same input, need the same quantized activations. Later calls may hold nodes of the same graph. So a
/// result is left out of memory only if this graph overwrites that memory.
std::vector<fusion> find_fusions(ggml_tensor **nodes, int n, const std::vector<bool> &is_product,
                                 const std::function<bool(int, int)> &same_format);

}  // namespace agq
