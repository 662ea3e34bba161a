// Threads take units of work from a shared counter, so a slow or busy core takes fewer.
#include "nodes/q8_product.h"

#include <algorithm>

#include "host/tensor_rows.h"

namespace agq {

namespace {

constexpr int units_per_thread = 16;
constexpr int64_t fewest_rows = 64;  // of a unit: calls must not cost more than they do

q8_group *packed_tokens(const q8_product &p) {
    return static_cast<q8_group *>(p.packed->of(0));
}

int64_t groups(const q8_product &p) {
    return p.node->src[1]->ne[0] / (2 * q8_columns);
}

}  // namespace

bool is_q8_product(const ggml_tensor *node) {
    if (node->op != host.op_mul_mat) return false;
    const ggml_tensor *w = node->src[0], *x = node->src[1];
    // Weights in a layout of the host's own have `extra`.
    const bool plain = w->type == ggml_type_q8_0 && !w->view_src && w->data && !w->extra && w->ne[3] == 1 &&
                       w->ne[0] % (2 * q8_columns) == 0 && w->nb[0] == q8_bytes &&
                       w->nb[1] == static_cast<size_t>(w->ne[0] / q8_columns) * q8_bytes &&
                       w->nb[2] == static_cast<size_t>(w->ne[1]) * w->nb[1];
    const bool same_heads = w->ne[2] == 1 || (w->ne[2] == x->ne[2] && x->ne[3] == 1);
    return plain && same_heads && x->type == ggml_type_f32 && x->nb[0] == sizeof(float) && x->ne[0] == w->ne[0] &&
           node->type == ggml_type_f32 && node->nb[0] == sizeof(float);
}

int64_t q8_product::tokens() const {
    const ggml_tensor *x = node->src[1];
    return x->ne[1] * x->ne[2] * x->ne[3];
}

size_t q8_product::packed_bytes() const {
    return static_cast<size_t>(tokens() * groups(*this)) * sizeof(q8_group);
}

size_t q8_product::thread_bytes() const {
    return static_cast<size_t>(tokens()) * sizeof(float *);
}

void q8_pack_node(ggml_tensor *, int, int, void *userdata) {
    q8_product &p = *static_cast<q8_product *>(userdata);
    const ggml_tensor *x = p.node->src[1];
    for (int64_t t; (t = p.next_token.fetch_add(1, std::memory_order_relaxed)) < p.tokens();) {
        p.kern->pack(reinterpret_cast<const float *>(flat_row(x, t)), x->ne[0], packed_tokens(p) + t * groups(p));
    }
}

void q8_multiply_node(ggml_tensor *, int ith, int nth, void *userdata) {
    q8_product &p = *static_cast<q8_product *>(userdata);
    const ggml_tensor *w = p.node->src[0];
    const int64_t rows = w->ne[1], heads = w->ne[2], tokens = p.tokens() / heads;
    const int64_t step =
        std::clamp(rows * heads / (int64_t{nth} * units_per_thread), std::min(fewest_rows, rows), rows);
    const int64_t units = (rows + step - 1) / step;
    auto *dst = static_cast<float **>(p.memory->of(ith));
    for (int64_t i; (i = p.next_rows.fetch_add(1, std::memory_order_relaxed)) < heads * units;) {
        const int64_t head = i / units, row = i % units * step;
        for (int64_t t = 0; t < tokens; ++t) {
            const char *result = flat_row(p.node, head * tokens + t);
            dst[t] = const_cast<float *>(reinterpret_cast<const float *>(result)) + row;
        }
        const uint8_t *first =
            static_cast<const uint8_t *>(w->data) + (head * rows + row) * static_cast<int64_t>(w->nb[1]);
        const q8_group *packed = packed_tokens(p) + head * tokens * groups(p);
        p.kern->multiply({first, w->ne[0], std::min(step, rows - row), packed, tokens, dst});
    }
}

}  // namespace agq
