// What happened to the tokens of a thread's last sequence, for programs that display it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "format/attributes.h"

namespace agq {

class prune_history {
  public:
    /// Records the ubatch that begins at `position`: for each token, the layer after which it was dropped, or -1.
    /// Forgets later positions.
    void record(int32_t position, const std::vector<int32_t> &layer_of_token);
    /// The same for a ubatch of `n` tokens, none of them dropped.
    void record_kept(int32_t position, size_t n);
    /// Sets the layer of single positions, if they are known.
    void record_at(int32_t position, int32_t layer);
    const std::vector<int32_t> &layers() const { return layers_; }

    /// Records, by pruning layer, the importance of each token of the ubatch that was pruned last.
    void record_importance(const std::map<int, std::vector<float>> &importance) { importance_ = importance; }
    const std::map<int, std::vector<float>> &importance() const { return importance_; }

    /// The same for the attention heads that pruning looked at.
    void record_head_weights(const std::map<attention_head, std::vector<float>> &weights) { head_weights_ = weights; }
    const std::map<attention_head, std::vector<float>> &head_weights() const { return head_weights_; }

    /// The calling thread's history.
    static prune_history &of_thread();

  private:
    bool begin_at(int32_t position, size_t n);

    std::vector<int32_t> layers_;  ///< by position
    std::map<int, std::vector<float>> importance_;
    std::map<attention_head, std::vector<float>> head_weights_;
};

}  // namespace agq
