// Score: how much attention a token gets from the last tokens, which are kept. Rows that see more keys get more weight.
#include "scores/attention_weights.h"

namespace agq {

namespace {

constexpr int last_queries = 8;

class recent_meter : public attention_meter {
  public:
    explicit recent_meter(const attention_kernel *kern) : attention_meter(kern, last_queries, visible_keys::always) {}

  private:
    void add(const weight_block &block, std::vector<int64_t> *sums) const override {
        add_rows(block, block.visible, sums);
    }

    void finish(std::vector<double> *values) const override {
        const double queries = static_cast<double>(values->size() - static_cast<size_t>(first_query()));
        for (double &value : *values) value /= queries;
    }
};

}  // namespace

const score score_recent = {"recent", 2, score_input::attention, last_queries, false, make_meter<recent_meter>};

}  // namespace agq
