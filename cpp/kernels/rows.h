// The contract of the row kernels: what the host computes on activation rows between two matrix products. The plugin
// does it while it quantizes the rows.
//
// All numbers are binary32. Except in the gated units, operations and their order are the host's, so results are
// bit-identical. Sums over a row are an exception: they use binary64 in a different order, which changes about one
// result in some million rows. `y` may be one of the inputs.
#pragma once

#include <cstdint>

namespace agq {

struct row_kernel {
    /// y = a + b
    void (*add)(const float *a, const float *b, int64_t n, float *y);
    /// y = x * 1 / sqrt(mean of x^2 + eps) * weight
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *y);
    /// y = (x - mean of x) * 1 / sqrt(variance of x + eps) * weight + bias; bias may be null
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int64_t n, float *y);
    /// y = gate / (1 + e^-gate) * up, within 8 units in the last place
    void (*swiglu)(const float *gate, const float *up, int64_t n, float *y);
    /// gpt-oss's unit: y = g / (1 + e^(-alpha g)) * (u + 1), where g is the gate, at most `limit`, and u is up, between
    /// -limit and limit; within 8 units in the last place
    void (*swiglu_oai)(const float *gate, const float *up, float alpha, float limit, int64_t n, float *y);
    /// terms[i] = (x[i] + bias[i]) * weights[i], y = (terms[0] + terms[1]) + ..., `count` rows. Null: no bias; nobody
    /// needs the terms. terms[i] may be x[i].
    void (*weighted_sum)(const float *const *x, const float *const *bias, const float *weights, int count, int64_t n,
                         float *const *terms, float *y);
};

}  // namespace agq
