#include "nodes/row_source.h"

#include <cstring>
#include <utility>

#include "host/tensor_rows.h"

namespace agq {

void row_source::compute(const row_kernel &kern, int64_t row, float *to) const {
    const auto floats = [row](const ggml_tensor *t) { return reinterpret_cast<float *>(flat_row(t, row)); };
    const int64_t n = result->ne[0];
    if (what == operation::swiglu) {
        const float *gate = floats(x), *other = up ? floats(up) : gate + n;
        if (swapped) std::swap(gate, other);
        kern.swiglu(gate, other, n, to);
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

}  // namespace agq
