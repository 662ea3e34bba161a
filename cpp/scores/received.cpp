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
            const int32_t own = columns()[static_cast<size_t>(block.first + r / block.group)];
            if (own != no_column) block.weights[r * block.stride + own] = 0;  // only later tokens count
        }
        add_rows(block, nullptr, sums);
    }

    void finish(std::vector<double> *values) const override {
        double evenly = 0;               // what later tokens would give this one with uniform attention
        size_t behind = values->size();  // the first of those whose window this token has left
        for (size_t i = values->size(); i-- > 0;) {
            for (; behind > i + 1 && first_seen()[behind - 1] > i; --behind) evenly -= evenly_of(behind - 1);
            if (behind == i + 1) evenly = 0;  // nobody sees it; the differences above leave a rest
            (*values)[i] /= evenly;           // NaN for the last token
            evenly += evenly_of(i);
        }
    }

    /// What a token gives each of the keys that it sees, with uniform attention.
    double evenly_of(size_t i) const { return visible()[i] > 0 ? 1.0 / static_cast<double>(visible()[i]) : 0.0; }
};

}  // namespace

const score score_received = {"received", 1, score_input::attention, 0, false, make_meter<received_meter>};

}  // namespace agq
