// The loop of the Q8_0 kernels over rows and tokens.
//
// Everything is in an anonymous namespace, because each kernel file is compiled with flags of its own.
#pragma once

#include "kernels/q8.h"

namespace agq {
namespace {

/// How far ahead to ask for weights, at least. Into the second-level cache: a Zen 4 reads twice as fast as with
/// requests into the first, which can wait for few lines at once.
constexpr size_t q8_fetch_bytes = 16384;

/// Some rows times `count` <= n tokens, with tiles of as many rows as there are.
template <class tiles, int n = tiles::most_tokens>
void q8_multiply_tokens(const q8_args &args, int64_t row, int rows, int64_t token, int count) {
    if constexpr (n > 1) {
        if (count < n) return q8_multiply_tokens<tiles, n - 1>(args, row, rows, token, count);
    }
    constexpr int many = tiles::rows_for(n), few = tiles::rows_for(tiles::most_tokens);
    int r = 0;
    for (; r + many <= rows; r += many) tiles::template multiply<many, n>(args, row + r, token);
    for (; r + few <= rows; r += few) tiles::template multiply<few, n>(args, row + r, token);
    for (; r < rows; r++) tiles::template multiply<1, n>(args, row + r, token);
}

/// The q8_kernel::multiply of an instruction set, whose `tiles` are
///
///   constexpr int most_tokens                  of a tile
///   constexpr int rows_for(int n)              rows of a tile of n tokens, as many as accumulators have registers; no
///                                              fewer for fewer tokens
///   void multiply<rows, n>(args, row, token)   dst[token + t][row + r] for r < rows and t < n
///
/// Few rows at a time meet all tokens, so their weights stay in the cache.
template <class tiles>
void q8_multiply(const q8_args &args) {
    constexpr int most = tiles::most_tokens;
    const int step = tiles::rows_for(static_cast<int>(args.n_tokens < most ? args.n_tokens : most));
    for (int64_t row = 0; row < args.rows; row += step) {
        const int rows = static_cast<int>(args.rows - row < step ? args.rows - row : step);
        for (int64_t token = 0; token < args.n_tokens; token += most) {
            const int64_t left = args.n_tokens - token;
            q8_multiply_tokens<tiles>(args, row, rows, token, static_cast<int>(left < most ? left : most));
        }
    }
}

}  // namespace
}  // namespace agq
