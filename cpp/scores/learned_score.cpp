#include "scores/learned_score.h"

#include <algorithm>
#include <cmath>

namespace agq {

float learned_importance(const float *state, const std::vector<float> &direction) {
    double product = 0, square = 0;
    for (size_t i = 0; i < direction.size(); ++i) {
        product += static_cast<double>(direction[i]) * static_cast<double>(state[i]);
        square += static_cast<double>(state[i]) * static_cast<double>(state[i]);
    }
    const double rms = std::sqrt(square / static_cast<double>(direction.size()));
    constexpr double limit = 80;  // e^80 and e^-80 are floats
    const double value = rms > 0 ? product / rms : 0;
    return static_cast<float>(std::exp(std::isnan(value) ? value : std::clamp(value, -limit, limit)));
}

void learned_node(ggml_tensor *, int ith, int nth, void *userdata) {
    learned_job &job = *static_cast<learned_job *>(userdata);
    const size_t n = job.rows.size(), part = static_cast<size_t>(ith), parts = static_cast<size_t>(nth);
    for (size_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
        const char *row =
            static_cast<const char *>(job.state->data) + static_cast<size_t>(job.rows[i]) * job.state->nb[1];
        job.importance[i] = learned_importance(reinterpret_cast<const float *>(row), *job.direction);
    }
}

}  // namespace agq
