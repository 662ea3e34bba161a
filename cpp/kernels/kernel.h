// THE kernel contract: the fields of a kernel row, and the layout of every operand. One row per instruction set.
//
// A kernel never allocates, starts threads or prints. Many threads may call it at once if their outputs do not overlap.
// Weights, activations and outputs must not overlap. Pointers need no alignment beyond their element type (weights: 1
// byte), though 64-byte alignment is fastest. A kernel never reads or writes outside the operands described here;
// prefetches may.
#pragma once

#include "format/activation_format.h"
#include "format/blocks.h"
#include "kernels/fetch_ahead.h"
#include "kernels/isa.h"

namespace agq {

/// Packed activations of up to `nr` tokens, nr being the kernel's.
///
/// Layout for n tokens (n <= nr), columns in stored order, kr being the kernel's too:
///   q      int8  [k / kr][n][kr]  token t, column kr i + j at (i * n + t) * kr + j; with 4 bits plus the kernel's
///                                 offset4
///   bias   int32 [k / 64][n]     -64 * (sum of q over the group): starting value of the integer sums, because kernels
///                                multiply by the unsigned codebook byte u, which stands for u - 64
///   scale  float [n] or [k / 64][n] with per_group
struct activation_block {
    int8_t *q;
    int32_t *bias;
    float *scale;
    int n;
};

/// Quantizes and packs one block. `rows[t]`, t < block.n, points to `format.k` floats. Formulas: docs/format.md,
/// "Meaning". The integers are exact, and equal in all kernels. If a token holds NaN or infinity, before or after
/// rotation, its scale becomes NaN (in every group) and its q becomes 0.
using quantize_fn = void (*)(const activation_format &format, const float *const *rows, const activation_block &block);

/// Work of one call: `panels` consecutive panels of a weight matrix times the activation blocks of `n_tokens` tokens.
///
///   dst[t][16 p + r] = tensor_scale * sum over groups of D * I * scale    (docs/format.md, "Meaning")
///
/// for panels p < `panels`, rows r < 16 and tokens t < n_tokens. All blocks but the last hold nr tokens, the last holds
/// the rest, 1..nr. Block b begins at q + b * nr * k, bias + b * nr * (k / 64), scale + b * nr * (1 or k / 64).
struct gemm_args {
    const tile *weights;      ///< the first panel; panels of 16 rows follow one another (format/panel.h)
    int k;                    ///< columns, a multiple of 64
    int panels;               ///< >= 1
    const uint8_t *codebook;  ///< [16] values 0..127
    float tensor_scale;
    bool per_group;
    const int8_t *q;
    const int32_t *bias;
    const float *scale;
    int n_tokens;       ///< >= 1
    float *const *dst;  ///< [n_tokens] where each token's result for the first panel row goes
    int bits = 8;  ///< 8 or 4, as in activation_format: |q| is at most 127 or 7. 8 is always correct, 4 may be faster
    fetch_ahead ahead = {};
};

using gemm_fn = void (*)(const gemm_args &args);

/// One kernel. To add one, write a file and add a row to the table below and a line to cmake/kernels.cmake.
struct kernel {
    const char *name;
    bool (*supported)();  ///< whether this CPU and operating system can run it
    int nr;               ///< tokens of a full activation block
    int panel_step;       ///< calls should cover a multiple of this many panels, and at least this many
    quantize_fn quantize;
    gemm_fn gemm;
    const attention_kernel *attention;  ///< null if the compiler has no vector types: the host's attention is used
    int kr = 4;                         ///< columns of a token that lie together in a packed block: 4, 8, 16 or 32
    int offset4 = 0;                    ///< added to q if it was quantized to 4 bits: 0 or 8
    const row_kernel *rows = &isa::generic::rows;
    const rounding_kernel *rounding = &isa::generic::rounding;
    const q8_kernel *q8 = nullptr;  ///< null: the host's products with Q8_0 are used
};

/// The kernels of a build, best first; scalar is the last. Row NAME is `kernel_NAME`, which its own file defines.
#if defined(__x86_64__) || defined(_M_X64)
#define AGQ_KERNELS(row) row(avx512vnni) row(avxvnni) row(avx2) row(scalar)
#elif defined(__aarch64__) || defined(_M_ARM64)
#define AGQ_KERNELS(row) row(neon_i8mm) row(neon_dotprod) row(neon) row(scalar)
#else
#define AGQ_KERNELS(row) row(scalar)
#endif

#define AGQ_DECLARE_KERNEL(name) extern const kernel kernel_##name;
AGQ_KERNELS(AGQ_DECLARE_KERNEL)
#undef AGQ_DECLARE_KERNEL

}  // namespace agq
