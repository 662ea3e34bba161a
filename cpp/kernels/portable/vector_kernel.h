// Shared by all vector kernels: the loop over packed blocks, the columns of an activation row in stored order, and the
// quantizer, which calls each kernel's arithmetic on 64 columns.
//
// Everything is in an anonymous namespace: each kernel file is compiled with its own flags, and the linker must not
// merge the copies. For the same reason no template or inline function of the standard library is used.
#pragma once

#include <cstring>
#include <limits>

#include "kernels/kernel.h"

namespace agq {
namespace {

// packed activations

/// Block b of the packed activations, only for reading; the type is shared with the quantizer, which writes.
template <int nr>
inline activation_block block_at(const gemm_args &args, int b) {
    const size_t tokens = static_cast<size_t>(b) * nr;
    const size_t groups = args.k / group_columns;
    const int left = args.n_tokens - b * nr;
    return {const_cast<int8_t *>(args.q + tokens * args.k), const_cast<int32_t *>(args.bias + tokens * groups),
            const_cast<float *>(args.scale + tokens * (args.per_group ? groups : 1)), left < nr ? left : nr};
}

/// The remaining factor for the sum of token t.
inline float final_factor(const gemm_args &args, const activation_block &block, int t) {
    return args.per_group ? args.tensor_scale : args.tensor_scale * block.scale[t];
}

// quantizer

/// Returns the groups of one row. If a group's 64 columns are adjacent in the row, the result points into the row.
/// Otherwise they are gathered into the reader's own buffer.
class column_reader {
  public:
    column_reader(const activation_format &format, const float *row) : format_(format), row_(row) {}

    /// The next 64 columns, valid until the next call.
    const float *next_group() {
        if (column_ >= format_.n_listed) {
            skip_listed();
            if (run_end() - channel_ >= group_columns) {
                const float *group = row_ + channel_;
                channel_ += group_columns;
                column_ += group_columns;
                return group;
            }
        }
        for (int filled = 0; filled < group_columns;) filled += fill(filled);
        column_ += group_columns;
        return buffer_;
    }

  private:
    /// Copies at least one column to buffer_[filled ...] and returns how many.
    int fill(int filled) {
        const int column = column_ + filled;
        if (column < format_.n_listed) {
            buffer_[filled] = row_[format_.listed[column]];
            return 1;
        }
        skip_listed();
        int count = run_end() - channel_;
        if (count > group_columns - filled) count = group_columns - filled;
        std::memcpy(buffer_ + filled, row_ + channel_, count * sizeof(float));
        channel_ += count;
        return count;
    }

    /// Advances channel_ to the next channel that is not listed.
    void skip_listed() {
        while (sorted_ < format_.n_listed && format_.listed_sorted[sorted_] == channel_) {
            sorted_++;
            channel_++;
        }
    }

    /// End of the run of unlisted channels that begins at channel_.
    int run_end() const { return sorted_ < format_.n_listed ? format_.listed_sorted[sorted_] : format_.k; }

    const activation_format &format_;
    const float *row_;
    int column_ = 0;   ///< next stored column
    int channel_ = 0;  ///< next channel of the unlisted part
    int sorted_ = 0;   ///< listed channels below channel_
    alignas(64) float buffer_[group_columns];
};

/// 2^-e for an exponent of 0..15, built from its bits.
inline float refinement(int e) {
    const int bits = (127 - e) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/// Quantizes token t of the block. `ops` is the kernel's arithmetic on the 64 columns of a group:
///
///   maximum                                  running maximum of |x * refine|, as the bits of a binary32. Among numbers
///                                            without sign the order of the bits is the order of the values, with
///                                            infinity above all finite numbers and NaN above infinity: an integer
///                                            maximum finds the largest value and tells whether there was a NaN or an
///                                            infinity
///       void add(const float *x, float refine)
///       int bits() const
///   void rotate(x, refine, y)                the result of rotate_group for x * refine, bit for bit
///   int quantize(x, refine, factor, limit, n, q)   writes column j to q[j / kr * kr * n + j % kr] and returns the
///                                                  sum of the values
/// `offset4` is added to 4-bit values; quantize() must add it, too.
template <class ops, int kr, int offset4>
inline void quantize_token(const activation_format &format, const float *row, const activation_block &block, int t) {
    constexpr int infinity = 0x7F800000;
    constexpr int smallest = (127 - 100) << 23;  // 2^-100: smaller values count as zero
    const size_t groups = format.k / group_columns;
    const size_t n = block.n;
    const int limit = format.bits == 4 ? 7 : 127;
    alignas(64) float rotated[group_columns];
    float factor = 0.0f;
    int worst = 0;  // largest maximum of the token

    const auto set_scale = [&](size_t i, int bits) {
        float amax;
        std::memcpy(&amax, &bits, sizeof amax);
        const bool zero = bits < smallest;
        factor = zero ? 0.0f : static_cast<float>(limit) / amax;
        block.scale[i * n + t] = zero ? 0.0f : amax / static_cast<float>(limit);
        if (bits > worst) worst = bits;
    };
    if (!format.per_group) {
        column_reader columns(format, row);
        typename ops::maximum maximum;
        for (size_t g = 0; g < groups; g++) maximum.add(columns.next_group(), refinement(format.exponents[g]));
        set_scale(0, maximum.bits());
    }
    column_reader columns(format, row);
    for (size_t g = 0; g < groups; g++) {
        const float *x = columns.next_group();
        float refine = refinement(format.exponents[g]);
        if (format.rotated) {
            ops::rotate(x, refine, rotated);
            x = rotated;
            refine = 1.0f;
        }
        if (format.per_group) {
            typename ops::maximum maximum;
            maximum.add(x, refine);
            set_scale(g, maximum.bits());
        }
        int8_t *q = block.q + (g * group_columns * n + kr * t);
        block.bias[g * n + t] = -code_offset * ops::quantize(x, refine, factor, limit, block.n, q);
    }
    if (worst < infinity) return;

    for (size_t i = 0; i < groups * (group_columns / kr); i++) {
        std::memset(block.q + (i * n + t) * kr, format.bits == 4 ? offset4 : 0, kr);
    }
    for (size_t g = 0; g < groups; g++) block.bias[g * n + t] = 0;
    for (size_t i = 0; i < (format.per_group ? groups : 1); i++) {
        block.scale[i * n + t] = std::numeric_limits<float>::quiet_NaN();
    }
}

/// The quantize_fn of a kernel.
template <class ops, int kr = 4, int offset4 = 0>
inline void quantize_block(const activation_format &format, const float *const *rows, const activation_block &block) {
    for (int t = 0; t < block.n; t++) quantize_token<ops, kr, offset4>(format, rows[t], block, t);
}

}  // namespace
}  // namespace agq
