// Score: a pseudorandom number in [0, 1) per position, the same in every run; a baseline for other scores.
#include "scores/score.h"

namespace agq {

namespace {

float random_importance(int32_t position, int layer) {
    // The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    uint64_t z = (static_cast<uint64_t>(static_cast<uint32_t>(position)) << 32 | static_cast<uint32_t>(layer)) +
                 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<float>((z ^ z >> 31) >> 40) * 0x1p-24f;
}

class random_meter : public score_meter {
  public:
    void prepare(const score_source &source, int) override { layer_ = source.layer; }
    void run(int, int) override {}
    std::vector<float> result() const override {
        std::vector<float> importance;
        importance.reserve(tokens.positions.size());
        for (int32_t position : tokens.positions) importance.push_back(random_importance(position, layer_));
        return importance;
    }

  private:
    int layer_ = 0;
};

std::unique_ptr<score_meter> make_random(const attention_kernel *) {
    return std::make_unique<random_meter>();
}

}  // namespace

const score score_random = {"random", not_stored, score_input::position, 0, false, make_random};

}  // namespace agq
