// Score: how much attention a token gets from later ones, relative to what uniform attention would give it.
#include "scores/attention_weights.h"

namespace agq {

namespace {

class received_meter : public attention_meter {
  public:
    explicit received_meter(const attention_kernel *kern) : attention_meter(kern, all_queries, visible_keys::once) {}

  private:
    void add(const weight_block &block, std::vector<int64_t> *sums) const override {
        for (int64_t r = 0; r < block.n_tokens * block.group; ++r) {
            const size_t token = static_cast<size_t>(block.first + r / block.group);
            block.weights[r * block.stride + tokens.cells[token]] = 0;  // only later tokens count
        }
        add_rows(block, nullptr, sums);
    }

    void finish(std::vector<double> *values) const override {
        double evenly = 0;  // what later tokens would give this one with uniform attention
        for (size_t i = values->size(); i-- > 0;) {
            (*values)[i] /= evenly;  // NaN for the last token
            if (visible()[i] > 0) evenly += 1.0 / static_cast<double>(visible()[i]);
        }
    }
};

}  // namespace

const score score_received = {"received", 1, score_input::attention, 0, false, make_meter<received_meter>};

}  // namespace agq
