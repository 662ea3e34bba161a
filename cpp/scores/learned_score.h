// The learned score: importance of a token from its state behind the attention of the pruning layer, by a direction
// that calibration found (docs/pruning.md, "Scores").
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "host/host.h"

namespace agq {

using state_direction = std::shared_ptr<const std::vector<float>>;

struct learned_job {
    const ggml_tensor *state = nullptr;  ///< F32 [channels, tokens], contiguous
    state_direction direction;           ///< as many numbers
    std::vector<int32_t> rows;           ///< of the state, ascending: tokens still there
    std::vector<float> importance;       ///< of each of these; has as many elements before the node runs
};

/// exp(direction * x / rms(x)), which is above 0 and finite for all finite states.
float learned_importance(const float *state, const std::vector<float> &direction);

/// Function of the custom node behind the state; `userdata` is the learned_job.
void learned_node(ggml_tensor *dst, int ith, int nth, void *userdata);

}  // namespace agq
