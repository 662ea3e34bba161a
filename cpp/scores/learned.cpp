// Score: computed from a token's state after the attention of the pruning layer, with a direction learned in
// calibration.
#include <algorithm>
#include <cmath>

#include "host/tensor_rows.h"
#include "scores/score.h"

namespace agq {

namespace {

/// exp(direction * x / rms(x)); positive and finite for all finite states.
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

class learned_meter : public score_meter {
  public:
    void prepare(const score_source &source, int) override {
        state_ = source.state;
        direction_ = source.direction;
        importance_.resize(tokens.rows.size());
    }

    void run(int ith, int nth) override {
        const size_t n = tokens.rows.size(), part = static_cast<size_t>(ith), parts = static_cast<size_t>(nth);
        for (size_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
            const char *row = row_address(state_, tokens.rows[i], 0, 0);
            importance_[i] = learned_importance(reinterpret_cast<const float *>(row), *direction_);
        }
    }

    std::vector<float> result() const override { return importance_; }

  private:
    const ggml_tensor *state_ = nullptr;
    state_direction direction_;
    std::vector<float> importance_;
};

std::unique_ptr<score_meter> make_learned(const attention_kernel *) {
    return std::make_unique<learned_meter>();
}

std::string find_obstacle(const score_source &source) {
    const std::string layer = "layer " + std::to_string(source.layer);
    if (!source.direction) return "the file has no learned score for " + layer;
    const ggml_tensor *t = source.state;
    if (!t) return "a learned score needs layers in which the feed-forward part follows the attention";
    if (t->type != ggml_type_f32 || t->ne[0] != static_cast<int64_t>(source.direction->size()) || !is_contiguous(t)) {
        return "the learned score of " + layer + " has " + std::to_string(source.direction->size()) +
               " channels, but the model's states have " + std::to_string(t->ne[0]);
    }
    return "";
}

}  // namespace

const score score_learned = {"learned", 3, score_input::state, 0, true, make_learned, find_obstacle};

}  // namespace agq
