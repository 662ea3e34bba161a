// Score `heads`: how much the last tokens of a prompt attend to each token, in a few attention heads that calibration
// chose (docs/pruning.md, "Scores"). The mean over all heads hides what these few know.
#pragma once

#include <cstdint>
#include <vector>

#include "scores/attention_weights.h"

namespace agq {

constexpr int observing_tokens = 16;  ///< so many last tokens of a ubatch observe the others, and stay

/// Measures, for some query heads of one attention, the largest weight that any observing token gives to each token.
/// There may be more cells than rows: the observers are the last rows.
class head_probe : public weight_visitor {
  public:
    explicit head_probe(const attention_kernel *kern) : weight_visitor(kern, observing_tokens, visible_keys::unused) {}

    std::vector<int> heads;  ///< which to measure, ascending; set before `prepare`

    void prepare(const score_source &source, int threads) override;
    /// The largest weights of `heads[i]`, one for each of `tokens.cells`.
    std::vector<float> largest(size_t i) const;
    /// The mean of all measured heads.
    std::vector<float> result() const override;

  private:
    bool wants(int64_t head, int64_t group) const override;
    void visit(const weight_block &block, int ith) override;

    std::vector<std::vector<float>> largest_;  ///< by thread; [heads][tokens]
};

/// How much a token of a prompt has in common with the question at its end: 1 / n if the question contains a token that
/// occurs n times before the question, else 0; then the mean over 65 neighbours. The question are the 24 tokens in
/// front of the last `tail`. Throws std::bad_alloc.
std::vector<float> word_overlap(const std::vector<int32_t> &ids, int tail);

/// The importance of tokens, from what several measures say of each. A measure counts by its share: each token gets the
/// highest value within `reach` places, divided by the sum over all candidates. The mean of these shares, times
/// `n_tokens`, is the importance: a token that is like the average of the prompt has 1. NaN for tokens that are no
/// candidates. Throws std::bad_alloc.
std::vector<float> mean_share(const std::vector<std::vector<float>> &measures, const std::vector<int> &reach,
                              const std::vector<uint8_t> &is_candidate, int64_t n_tokens);

}  // namespace agq
