// The reference kernel: the formulas of docs/format.md, one value at a time. The integers of every other kernel must
// equal its integers bit for bit. It is slow on purpose and runs everywhere.
#include <cmath>
#include <cstring>
#include <limits>

#include "format/panel.h"
#include "format/rotation.h"
#include "kernels/kernel.h"

namespace agq {
namespace {

constexpr int nr = 4;

/// The stored order of columns: the listed channels, then all others, ascending. Call with column = 0, 1, 2, ... in
/// turn.
struct column_order {
    const activation_format &format;
    int next_channel = 0;  ///< smallest channel not yet checked for the second part
    int next_sorted = 0;   ///< first entry of listed_sorted that is >= next_channel

    int channel(int column) {
        if (column < format.n_listed) return format.listed[column];
        while (next_sorted < format.n_listed && format.listed_sorted[next_sorted] == next_channel) {
            next_sorted++;
            next_channel++;
        }
        return next_channel++;
    }
};

/// The binary32 number 2^exponent, built from its bits.
float power_of_two(int exponent) {
    return std::ldexp(1.0f, exponent);
}

/// Values of the next group of stored columns before scaling: refined activations, rotated if the format says so.
void load_group(const activation_format &format, const float *row, column_order &order, int g, float *group) {
    for (int i = 0; i < group_columns; i++) {
        group[i] = row[order.channel(g * group_columns + i)] * power_of_two(-format.exponents[g]);
    }
    if (format.rotated) rotate_group(group);
}

void quantize_token(const activation_format &format, const float *row, const activation_block &block, int t) {
    const int groups = format.k / group_columns;
    const int span = format.per_group ? group_columns : format.k;  // columns that share a scale
    const float limit = format.bits == 4 ? 7.0f : 127.0f;
    bool finite = true;

    column_order order_amax{format}, order_quantize{format};
    float group[group_columns];
    for (int begin = 0; begin < format.k; begin += span) {
        float amax = 0.0f;
        for (int g = begin / group_columns; g < (begin + span) / group_columns; g++) {
            load_group(format, row, order_amax, g, group);
            for (const float value : group) {
                finite = finite && std::isfinite(value);
                if (std::fabs(value) > amax) amax = std::fabs(value);
            }
        }
        const bool zero = amax < power_of_two(-100);
        const float factor = zero ? 0.0f : limit / amax;
        block.scale[begin / span * block.n + t] = zero ? 0.0f : amax / limit;

        for (int g = begin / group_columns; g < (begin + span) / group_columns; g++) {
            load_group(format, row, order_quantize, g, group);
            int sum = 0;
            for (int i = 0; i < group_columns; i++) {
                const int k = g * group_columns + i;
                const float scaled = group[i] * factor;
                float rounded = std::isfinite(scaled) ? std::nearbyint(scaled) : 0.0f;
                if (rounded > limit) rounded = limit;
                if (rounded < -limit) rounded = -limit;
                const int value = static_cast<int>(rounded);
                block.q[(k / 4 * block.n + t) * 4 + k % 4] = static_cast<int8_t>(value);
                sum += value;
            }
            block.bias[g * block.n + t] = -code_offset * sum;
        }
    }
    if (finite) return;
    for (int k = 0; k < format.k; k++) block.q[(k / 4 * block.n + t) * 4 + k % 4] = 0;
    for (int g = 0; g < groups; g++) block.bias[g * block.n + t] = 0;
    for (int i = 0; i < format.k / span; i++) {
        block.scale[i * block.n + t] = std::numeric_limits<float>::quiet_NaN();
    }
}

void quantize(const activation_format &format, const float *const *rows, const activation_block &block) {
    for (int t = 0; t < block.n; t++) quantize_token(format, rows[t], block, t);
}

float half_to_float(unsigned bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const int mantissa = static_cast<int>(bits & 1023);
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

/// Sum over the groups of D * I, times the (token, group) scale if there is one.
float row_product(const gemm_args &args, const tile *panel, int row, const activation_block &block, int t) {
    const int groups = args.k / group_columns;
    float sum = 0.0f;
    for (int g = 0; g < groups; g++) {
        const stored_group w = group_of(panel, panel_rows, groups, g);
        int32_t integer = block.bias[g * block.n + t];
        for (int i = 0; i < group_columns; i++) {
            const int k = g * group_columns + i;
            integer += args.codebook[w.code(row, i)] * block.q[(k / 4 * block.n + t) * 4 + k % 4];
        }
        const float product = half_to_float(w.scale_bits(row)) * static_cast<float>(integer);
        sum += args.per_group ? product * block.scale[g * block.n + t] : product;
    }
    return sum;
}

void gemm(const gemm_args &args) {
    const int groups = args.k / group_columns;
    for (int token = 0; token < args.n_tokens; token++) {
        const size_t b = token / nr;
        const int t = token % nr;
        const int left = args.n_tokens - token + t;
        // The operands are only read; the block type is shared with the quantizer, which writes.
        const activation_block block = {
            const_cast<int8_t *>(args.q + b * nr * args.k), const_cast<int32_t *>(args.bias + b * nr * groups),
            const_cast<float *>(args.scale + b * nr * (args.per_group ? groups : 1)), left < nr ? left : nr};
        for (int row = 0; row < args.panels * panel_rows; row++) {
            const tile *panel = panel_at(args.weights, row / panel_rows, groups);
            const float sum = row_product(args, panel, row % panel_rows, block, t);
            args.dst[token][row] = args.tensor_scale * (args.per_group ? sum : sum * block.scale[t]);
        }
    }
}

bool supported() {
    return true;
}

}  // namespace

const kernel kernel_scalar = {"scalar", supported, nr, 1, quantize, gemm, AGQ_ATTENTION(isa::generic::attention)};

}  // namespace agq
