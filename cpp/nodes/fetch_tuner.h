// Finds out which of fetch_choices is the fastest on this machine, from the first products of a model.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels/fetch_ahead.h"

namespace agq {

/// One for the process: the answer depends on the processor, not on the model. Results do not depend on it.
///
/// The choices take turns, each for some megabytes of weights. Then the one is kept that beats the default by most, and
/// by at least 2% in three of four rounds. The first time that weights are read does not count, because their pages
/// come into memory then.
class fetch_tuner {
  public:
    static fetch_tuner &of_process();

    /// The index of the choice for the next unit of work.
    int choice() const { return choice_.load(std::memory_order_relaxed); }
    /// Whether times are wanted.
    bool is_measuring() const { return measuring_.load(std::memory_order_relaxed); }
    /// A unit of work that took so long: `bytes` of `matrix`, few tokens. Thread-safe.
    void record(int choice, const void *matrix, int64_t bytes, int64_t nanoseconds);

  private:
    bool is_first_reading(const void *matrix, int64_t bytes);
    void finish();

    std::atomic<int> choice_{0};
    std::atomic<bool> measuring_{true};
    std::mutex mutex_;
    const void *first_ = nullptr;  ///< a matrix; when it is read again, all have been read
    int readings_ = 0;             ///< how often it was read
    int64_t skipped_ = 0;          ///< bytes read since it was first seen
    const void *latest_ = nullptr;
    int64_t bytes_ = 0, nanoseconds_ = 0;          ///< of this turn
    std::vector<double> speeds_[n_fetch_choices];  ///< of finished turns, in bytes per nanosecond
};

}  // namespace agq
