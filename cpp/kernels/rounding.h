// The contract of the rounding kernels: how the converter rounds one column group of the weights, for many rows at
// once. agq_gguf/matrix/column_feedback.py uses them, and stock_feedback.py the last two; tests/reference_rounding.py
// is the reference.
//
// Matrices are transposed: [64][n] holds the n rows of a weight matrix side by side, one column of the group after
// another. Rows are independent. `values` are the 16 values of a codebook, ascending. All numbers are binary32. Each
// row is computed in one fixed order, without fused multiply-adds, so that all kernels agree in every bit.
#pragma once

#include <cstdint>

namespace agq {

/// What codes stand for in a block of up to 256 columns of a stock type: steps * code + offsets, codes 0 to `most`.
struct rounding_grid {
    int64_t columns, n;
    const float *steps, *offsets;  ///< [columns][n]
    int most;
};

struct rounding_kernel {
    /// Finds the storable scale with the smallest error for each row, where a squared error in column j costs h[j].
    /// `weights` is [64][n], `scales` [n]. With `h_each`, h is [64][n], a separate cost for each row; otherwise [64].
    void (*search_scales)(const float *values, const float *weights, const float *h, bool h_each, int64_t n,
                          float *scales);

    /// Error feedback inside one group. From `weights` [64][n], which are not changed, computes scales [n], codes
    /// [64][n] and (W - Q) / U_jj [64][n]. `upper` is U [64][64]; only its upper triangle is read.
    void (*feed_back)(const float *values, const float *upper, const float *weights, int64_t n, uint8_t *codes,
                      float *scales, float *errors);

    /// Coordinate descent inside one group. Improves scales [n] and codes [64][n]; `change` [64][n] gets the resulting
    /// change of Q. `slope` [64][n] is H (W - Q) before the call; `inside` is the group's part of H [64][64],
    /// symmetric.
    void (*descend)(const float *values, const float *inside, const float *slope, int64_t n, uint8_t *codes,
                    float *scales, float *change);

    /// What errors in `k` columns of other groups change in a group of `n` rows: out -= left^T right, where `out` is
    /// [64][n], `right` [k][n] and `left` has k rows of 64 numbers, `stride` apart. k is a multiple of 4. Fast for a
    /// few rows, for which libraries are slow.
    void (*subtract_product)(const float *left, int64_t stride, const float *right, int64_t k, int64_t n, float *out);

    /// `feed_back` where the scales are given: codes [columns][n] and (W - Q) / U_jj [columns][n]. `upper` is
    /// [columns][columns].
    void (*feed_back_on_grid)(const rounding_grid &grid, const float *upper, const float *weights, uint8_t *codes,
                              float *errors);

    /// `descend` where the scales are given: improves codes [columns][n]; `inside` is [columns][columns].
    void (*descend_on_grid)(const rounding_grid &grid, const float *inside, const float *slope, uint8_t *codes,
                            float *change);
};

}  // namespace agq
