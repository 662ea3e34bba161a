// The contract of the Q8_0 kernels: products of a matrix in llama.cpp's type Q8_0, which the output matrix of a model
// usually has. llama.cpp reads the matrix once for each token; these kernels once for up to 8.
#pragma once

#include <cstddef>
#include <cstdint>

namespace agq {

constexpr int q8_columns = 32;  ///< of a block: columns that share a scale
constexpr int q8_bytes = 34;    ///< of a block: a binary16 scale, then 32 signed bytes

/// 64 columns of a token: 127 / (largest magnitude of 32 columns) times each value, rounded, plus 128. The scale of
/// each 32 columns, its reciprocal, stands in all lanes that it is multiplied with.
struct alignas(64) q8_group {
    uint8_t q[2 * q8_columns];
    float scale[2][8];
};

/// dst[t][r] = sum over blocks of weight scale * token scale * (integer sum of the block's products), r < rows
struct q8_args {
    const uint8_t *weights;  ///< the first row; rows of k / 32 blocks follow one another
    int64_t k;               ///< columns, a multiple of 64
    int64_t rows;
    const q8_group *tokens;  ///< [n_tokens][k / 64]
    int64_t n_tokens;
    float *const *dst;  ///< [n_tokens] where each token's result for the first row goes
};

struct q8_kernel {
    /// Packs k columns of one token. If a block holds NaN or infinity, its scale becomes NaN.
    void (*pack)(const float *x, int64_t k, q8_group *to);
    /// The result for a row and a token does not depend, bit for bit, on the other rows and tokens of the call.
    void (*multiply)(const q8_args &args);
};

}  // namespace agq
