// How far ahead kernels ask for weights that they read once, for few tokens.
#pragma once

#include "format/blocks.h"

namespace agq {

/// Bytes from what a kernel reads to what it asks for, into the first-level cache and into the second; 0: not ahead.
/// Panels follow one another in the file, so this continues into the next panel.
struct fetch_ahead {
    int level1 = 4 * sizeof(tile);
    int level2 = 16 * sizeof(tile);
};

/// Distances to choose from; the first is the default. Which is best depends on the processor. The first-level cache
/// can wait for a dozen lines at once, the second for several dozen: without the second distance, generation is a tenth
/// slower on an Emerald Rapids. Zen 4 fetches such streams ahead itself; both distances cost it 8% of its bandwidth.
constexpr fetch_ahead fetch_choices[] = {{}, {0, 0}, {4 * sizeof(tile), 0}};
constexpr int n_fetch_choices = sizeof fetch_choices / sizeof *fetch_choices;

}  // namespace agq
