// The rotation of a group of 64: times the Hadamard matrix of that size over 8. One value at a time; the definition of
// right, and what is used where speed does not matter.
#pragma once

#include "format/blocks.h"

namespace agq {

/// x [64] in place. Sums and differences of neighbours first, then of ever more distant ones, each rounded.
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
