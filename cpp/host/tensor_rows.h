// Row addresses, strides and memory of tensors.
#pragma once

#include <cstdint>

#include "host/host.h"

namespace agq {

inline char *row_address(const ggml_tensor *t, int64_t i1, int64_t i2, int64_t i3) {
    return static_cast<char *>(t->data) + i1 * static_cast<int64_t>(t->nb[1]) + i2 * static_cast<int64_t>(t->nb[2]) +
           i3 * static_cast<int64_t>(t->nb[3]);
}

/// Address of row `flat`, counted through all upper dimensions.
inline char *flat_row(const ggml_tensor *t, int64_t flat) {
    const int64_t i1 = flat % t->ne[1], rest = flat / t->ne[1];
    return row_address(t, i1, rest % t->ne[2], rest / t->ne[2]);
}

/// Whether the tensors have bytes in common. Both must have data.
inline bool shares_memory(const ggml_tensor *a, const ggml_tensor *b) {
    const char *from_a = static_cast<const char *>(a->data), *from_b = static_cast<const char *>(b->data);
    return from_a < from_b + host.ggml_nbytes(b) && from_b < from_a + host.ggml_nbytes(a);
}

/// Whether the elements are stored in order without gaps.
inline bool is_contiguous(const ggml_tensor *t) {
    const ggml_type_traits *traits = host.ggml_get_type_traits(t->type);
    size_t expected = traits->type_size;
    if (t->ne[0] != traits->blck_size && t->nb[0] != expected) return false;
    expected *= static_cast<size_t>(t->ne[0] / traits->blck_size);
    for (int d = 1; d < 4; ++d) {
        if (t->ne[d] != 1 && t->nb[d] != expected) return false;
        expected *= static_cast<size_t>(t->ne[d]);
    }
    return true;
}

}  // namespace agq
