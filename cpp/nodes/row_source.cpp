#include "nodes/row_source.h"

#include <cstring>
#include <utility>

#include "host/tensor_rows.h"

namespace agq {

namespace {

/// Adds the bias to row `row` of its input; the result goes to the row of `sum`.
void add_bias(const row_kernel &kern, const row_source::expert_bias &b, int64_t row, const ggml_tensor *sum) {
    if (!b.x) return;
    const int64_t slots = b.ids->ne[0];
    const char *id = row_address(b.ids, row / slots, 0, 0) + row % slots * static_cast<int64_t>(b.ids->nb[0]);
    const int64_t expert = *reinterpret_cast<const int32_t *>(id);
    // If the number is out of range, the row is NaN already.
    const char *bias = flat_row(b.bias, expert >= 0 && expert < b.bias->ne[1] ? expert : 0);
    kern.add(reinterpret_cast<const float *>(flat_row(b.x, row)), reinterpret_cast<const float *>(bias), sum->ne[0],
             reinterpret_cast<float *>(flat_row(sum, row)));
}

}  // namespace

void row_source::compute(const row_kernel &kern, int64_t row, float *to) const {
    const auto floats = [row](const ggml_tensor *t) { return reinterpret_cast<float *>(flat_row(t, row)); };
    const int64_t n = result->ne[0];
    if (what == operation::swiglu || what == operation::swiglu_oai) {
        add_bias(kern, gate_bias, row, x);
        add_bias(kern, up_bias, row, up);
        const float *gate = floats(x), *other = up ? floats(up) : gate + n;
        if (swapped) std::swap(gate, other);
        if (what == operation::swiglu) {
            kern.swiglu(gate, other, n, to);
        } else {
            kern.swiglu_oai(gate, other, alpha, limit, n, to);
        }
    } else {
        const float *input = floats(x);
        if (sum) kern.add(floats(addends[0]), floats(addends[1]), n, floats(sum));
        const float *w = static_cast<const float *>(weight->data);
        if (what == operation::rms_norm) {
            kern.rms_norm(input, w, eps, n, to);
        } else {
            kern.layer_norm(input, w, bias ? static_cast<const float *>(bias->data) : nullptr, eps, n, to);
        }
    }
    if (written) std::memcpy(floats(result), to, static_cast<size_t>(n) * sizeof(float));
}

size_t source_rows::thread_bytes() const {
    return static_cast<size_t>(source->result->ne[0]) * sizeof(float);
}

void source_rows_node(ggml_tensor *, int ith, int, void *userdata) {
    source_rows &rows = *static_cast<source_rows *>(userdata);
    const ggml_tensor *result = rows.source->result;
    const int64_t n = result->ne[1] * result->ne[2] * result->ne[3];
    for (int64_t i; (i = rows.next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        rows.source->compute(*rows.kern, i, static_cast<float *>(rows.memory->of(ith)));
    }
}

}  // namespace agq
