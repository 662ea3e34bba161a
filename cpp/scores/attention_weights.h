// Shared by the attention scores: recomputes the softmax weights of an attention from queries and keys. The soft-max
// tensor cannot be used: flash attention has none, and our attention node replaces it otherwise.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/thread_memory.h"
#include "nodes/attention.h"
#include "scores/score.h"

namespace agq {

/// Fills the constant part of the job from an attention; returns false if the kernels do not support it. Allocates
/// nothing.
bool plan_weights(const attention_site &site, const attention_kernel *kern, attention_job *job);

/// Weights of some rows for one key head.
struct weight_block {
    int64_t head;      ///< the first query head of the group
    int64_t first;     ///< index of the first of these rows in `tokens`
    int64_t n_tokens;  ///< row r of the weights is of token first + r / group
    int64_t group;
    const int64_t *visible;  ///< [n_tokens] number of keys that each token sees, if counted
    float *weights;          ///< [n_tokens * group][stride], may be overwritten
    int64_t stride;
};

/// Visits the attention weights of all tokens, or of the last ones, in blocks that do not depend on the number of
/// threads.
class weight_visitor : public score_meter {
  public:
    void prepare(const score_source &source, int threads) override;
    void run(int ith, int nth) override;

  protected:
    /// When to count the visible keys of a row: never, once per row, or for each key head.
    enum class visible_keys : uint8_t { unused, once, always };
    static constexpr int all_queries = 0;

    /// `last_queries`: how many of the last tokens are used as queries, or all_queries.
    weight_visitor(const attention_kernel *kern, int last_queries, visible_keys counted)
        : kern_(kern), last_queries_(last_queries), counted_(counted) {}

    /// Whether any of the `group` query heads from `head` on is visited.
    virtual bool wants(int64_t /*head*/, int64_t /*group*/) const { return true; }
    /// Uses a block on thread `ith`.
    virtual void visit(const weight_block &block, int ith) = 0;

    /// Index of the first of `tokens` that is used as a query.
    int64_t first_query() const;
    const std::vector<int64_t> &visible() const { return visible_; }
    /// Where the weights of each of tokens.cells stand in a row, and those of the sequence's first token; no_column if
    /// no query sees that key.
    const std::vector<int32_t> &columns() const { return columns_; }
    int32_t first_column() const { return first_column_; }
    static constexpr int32_t no_column = key_group::no_column;
    /// By row, if keys are counted once per row: the first of `tokens` that it sees. It sees all from there to itself.
    const std::vector<size_t> &first_seen() const { return first_seen_; }
    int64_t query_heads() const { return attention_.q->ne[2]; }

  private:
    const attention_kernel *kern_;
    const int last_queries_;
    const visible_keys counted_;

    attention_job attention_;  ///< queries, keys and mask of one stream; no values
    key_group keys_;           ///< the keys that the queries see
    std::vector<int32_t> columns_;
    int32_t first_column_ = no_column;
    thread_memory memory_;
    std::vector<int64_t> visible_;  ///< number of keys that each row sees
    std::vector<size_t> first_seen_;
    std::atomic<int64_t> next_{0};
};

/// Measures a score that is a sum of attention weights. Sums are fixed-point numbers, so the order in which threads add
/// does not matter.
class attention_meter : public weight_visitor {
  public:
    void prepare(const score_source &source, int threads) override;
    std::vector<float> result() const override;

  protected:
    using weight_visitor::weight_visitor;

    /// Adds a block's contribution to the sums, one per entry of `tokens`.
    virtual void add(const weight_block &block, std::vector<int64_t> *sums) const = 0;
    /// Converts sums over rows (means over heads) to importance.
    virtual void finish(std::vector<double> *) const {}

    /// A weight as a fixed-point number; NaN counts as 0.
    static int64_t fixed_point(float weight);
    /// Adds the weights that each of `tokens` gets from all rows. Each row is multiplied by its entry in `scales`
    /// (null: 1).
    void add_rows(const weight_block &block, const int64_t *scales, std::vector<int64_t> *sums) const;

  private:
    void visit(const weight_block &block, int ith) override { add(block, &sums_[static_cast<size_t>(ith)]); }

    std::vector<std::vector<int64_t>> sums_;  ///< by thread and row
};

template <class meter>
std::unique_ptr<score_meter> make_meter(const attention_kernel *kern) {
    return std::make_unique<meter>(kern);
}

}  // namespace agq
