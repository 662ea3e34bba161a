// Rotates a group of 64 values: multiplies it by the 64 x 64 Hadamard matrix, divided by 8. This is the reference
// version, one value at a time; it is used where speed does not matter.
#pragma once

#include "format/blocks.h"

namespace agq {

/// Rotates x [64] in place: sums and differences of neighbours first, then of ever more distant values, each rounded.
inline void rotate_group(float *x) {
    for (int i = 0; i < group_columns; i++) x[i] *= 0.125f;
    for (int half = 1; half < group_columns; half *= 2) {
        for (int i = 0; i < group_columns; i++) {
            if (i & half) continue;
            const float first = x[i], second = x[i + half];
            x[i] = first + second;
            x[i + half] = first - second;
        }
    }
}

}  // namespace agq
