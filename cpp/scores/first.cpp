// Score: how much a token attends to the first token of its sequence, as in the paper (Agile-Quant, section 3.2).
#include "scores/attention_weights.h"

namespace agq {

namespace {

class first_meter : public attention_meter {
  public:
    explicit first_meter(const attention_kernel *kern) : attention_meter(kern, all_queries, visible_keys::unused) {}

  private:
    void add(const weight_block &block, std::vector<int64_t> *sums) const override {
        if (first_column() == no_column) return;
        for (int64_t r = 0; r < block.n_tokens * block.group; ++r) {
            const float weight = block.weights[r * block.stride + first_column()];
            (*sums)[static_cast<size_t>(block.first + r / block.group)] += fixed_point(weight);
        }
    }
};

}  // namespace

const score score_first = {"first", 0, score_input::attention, 0, false, make_meter<first_meter>, nullptr, true};

}  // namespace agq
