// The contract of the rounding kernels: what the converter does with the weights of one group of columns, for many rows
// at once. agq_gguf/matrix/column_feedback.py says what for; tests/reference_rounding.py is the definition of right.
//
// Matrices are transposed: [64][n] has the n rows of a weight matrix side by side, one column of the group after the
// other. Rows do not influence each other. `values` are the 16 ascending ones of a codebook. All numbers are binary32;
// a row's are computed in one order, without fused multiply-adds, so that kernels agree in every bit.
#pragma once

#include <cstdint>

namespace agq {

struct rounding_kernel {
    /// The storable scale of each row that loses least where a squared error of column j costs h[j]; `weights` is
    /// [64][n], `scales` [n]. With `h_each`, h is [64][n]: every row has its own costs; otherwise [64].
    void (*search_scales)(const float *values, const float *weights, const float *h, bool h_each, int64_t n,
                          float *scales);

    /// Error feedback inside one group: scales [n], codes [64][n] and (W - Q) / U_jj [64][n] for `weights` [64][n],
    /// which are left as they are. `upper` is U [64][64], of which the upper triangle is read.
    void (*feed_back)(const float *values, const float *upper, const float *weights, int64_t n, uint8_t *codes,
                      float *scales, float *errors);

    /// Coordinate descent inside one group: scales [n] and codes [64][n] become better ones, `change` [64][n] is what
    /// that makes of Q. `slope` [64][n] is H (W - Q) before, `inside` the group's part of H [64][64], symmetric.
    void (*descend)(const float *values, const float *inside, const float *slope, int64_t n, uint8_t *codes,
                    float *scales, float *change);
};

}  // namespace agq
