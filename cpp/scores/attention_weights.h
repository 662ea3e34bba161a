// What scores of attention share: the softmax weights of the pruning layer, computed again from queries and keys,
// because the soft-max tensor does not exist with flash attention and is replaced by our attention node without it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/thread_memory.h"
#include "nodes/attention.h"
#include "scores/score.h"

namespace agq {

/// Fills the fixed part from an attention; returns false if the kernels do not cover it. Nothing is allocated.
bool plan_weights(const attention_site &site, const attention_kernel *kern, attention_job *job);

/// Weights of some rows for one head of keys.
struct weight_block {
    int64_t first;     ///< index of the first of these rows in `tokens`
    int64_t n_tokens;  ///< row r of the weights is of token first + r / group
    int64_t group;
    const int64_t *visible;  ///< [n_tokens] keys that each token sees, as far as they are counted
    float *weights;          ///< [n_tokens * group][stride], which may be overwritten
    int64_t stride;
};

/// Measures a score that is made of attention weights. Sums are fixed-point numbers, so that they do not depend on the
/// order in which threads add.
class attention_meter : public score_meter {
  public:
    void prepare(const score_source &source, int threads) override;
    void run(int ith, int nth) override;
    std::vector<float> result() const override;

  protected:
    /// When the keys that a row sees are counted: never, once for each row, or for each head of keys.
    enum class visible_keys : uint8_t { unused, once, always };
    static constexpr int all_queries = 0;

    /// `last_queries`: how many of the last tokens are looked at, or all_queries.
    attention_meter(const attention_kernel *kern, int last_queries, visible_keys counted)
        : kern_(kern), last_queries_(last_queries), counted_(counted) {}

    /// Adds what a block says to the sums, one for each of `tokens`.
    virtual void add(const weight_block &block, std::vector<int64_t> *sums) const = 0;
    /// Makes importance of sums over rows that are means over heads.
    virtual void finish(std::vector<double> *) const {}

    /// A weight as it is added; what is not a number counts as 0.
    static int64_t fixed_point(float weight);
    /// Adds the weights that each of `tokens` gets from all rows, each row times its entry in `scales` (null: 1).
    void add_rows(const weight_block &block, const int64_t *scales, std::vector<int64_t> *sums) const;
    /// Index of the first of `tokens` that is looked at.
    int64_t first_query() const;
    const std::vector<int64_t> &visible() const { return visible_; }

  private:
    const attention_kernel *kern_;
    const int last_queries_;
    const visible_keys counted_;
    attention_job attention_;  ///< queries, keys and mask of one stream; no values
    thread_memory memory_;
    std::vector<std::vector<int64_t>> sums_;  ///< by thread and row
    std::vector<int64_t> visible_;            ///< keys that each row can see
    std::atomic<int64_t> next_{0};
};

template <class meter>
std::unique_ptr<score_meter> make_meter(const attention_kernel *kern) {
    return std::make_unique<meter>(kern);
}

}  // namespace agq
