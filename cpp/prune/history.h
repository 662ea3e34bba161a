// What became of the tokens of the sequence that a thread has computed last, for programs that want to show it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace agq {

class prune_history {
  public:
    /// The ubatch that begins at `position`: for each token the layer behind which it was dropped, or -1. What is known
    /// of later positions is forgotten.
    void record(int32_t position, const std::vector<int32_t> &layer_of_token);
    /// The same for an ubatch of `n` tokens of which none was dropped.
    void record_kept(int32_t position, size_t n);
    const std::vector<int32_t> &layers() const { return layers_; }

    /// By pruning layer the importance of each token of the ubatch that was pruned last.
    void record_importance(const std::map<int, std::vector<float>> &importance) { importance_ = importance; }
    const std::map<int, std::vector<float>> &importance() const { return importance_; }

    /// That of the calling thread.
    static prune_history &of_thread();

  private:
    bool begin_at(int32_t position, size_t n);

    std::vector<int32_t> layers_;  ///< by position
    std::map<int, std::vector<float>> importance_;
};

}  // namespace agq
