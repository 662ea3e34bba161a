#include "nodes/expert_sum.h"

#include <algorithm>

#include "host/tensor_rows.h"

namespace agq {

namespace {

constexpr int64_t fewest_columns = 256;  // of a unit of work

const float *row_of(const ggml_tensor *t, int64_t i1, int64_t i2) {
    return reinterpret_cast<const float *>(row_address(t, i1, i2, 0));
}

}  // namespace

void expert_sum_node(ggml_tensor *, int, int nth, void *userdata) {
    expert_sum &s = *static_cast<expert_sum *>(userdata);
    const int64_t columns = s.result->ne[0], tokens = s.result->ne[1];
    const int n = static_cast<int>(s.outputs->ne[1]);
    // One token is divided among the threads, many are handed out one by one.
    const int64_t wanted = std::max<int64_t>(1, nth / tokens);
    const int64_t step = std::max(fewest_columns, (columns + wanted - 1) / wanted);
    const int64_t parts = (columns + step - 1) / step;
    const float *outputs[expert_sum::most], *biases[expert_sum::most];
    float weights[expert_sum::most], *weighted[expert_sum::most];
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < tokens * parts;) {
        const int64_t token = i / parts, first = i % parts * step;
        for (int e = 0; e < n; ++e) {
            outputs[e] = row_of(s.outputs, e, token) + first;
            weights[e] = *row_of(s.weights, e, token);
            if (s.weighted) weighted[e] = const_cast<float *>(row_of(s.weighted, e, token)) + first;
            if (!s.bias) continue;
            const char *id = row_address(s.ids, token, 0, 0) + e * static_cast<int64_t>(s.ids->nb[0]);
            const int64_t expert = *reinterpret_cast<const int32_t *>(id);
            // A number that is out of range has made the output NaN already.
            biases[e] = row_of(s.bias, expert >= 0 && expert < s.bias->ne[1] ? expert : 0, 0) + first;
        }
        float *to = const_cast<float *>(row_of(s.result, token, 0)) + first;
        s.kern->weighted_sum(outputs, s.bias ? biases : nullptr, weights, n, std::min(step, columns - first),
                             s.weighted ? weighted : nullptr, to);
    }
}

}  // namespace agq
