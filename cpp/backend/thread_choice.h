// Chooses with how many threads graphs run while other processes use the cores, too.
#pragma once

#include <cstdint>
#include <map>

namespace agq {

/// Cores count as shared while this thread is often interrupted. Then it is tried, now and again, whether half or twice
/// as many threads are faster; graphs of about the same number of tokens are tried together.
class thread_choice {
  public:
    /// Number of threads for the next graph, which computes `n_tokens` tokens: 1 to `n_threads`.
    int threads(int n_threads, int64_t n_tokens);
    /// Adds what that graph took, and how often the thread lost its core meanwhile.
    void record(double seconds, int64_t interruptions);
    bool shared() const { return shared_; }

  private:
    struct trial {
        int threads = 0, graphs = 0;
        double seconds = 0;  ///< per token, mean
    };
    /// Graphs of about the same number of tokens.
    struct load {
        trial chosen, tried;
        int graphs = 0;      ///< since the last trial
        int trials = 0;      ///< begun
        bool fewer = false;  ///< whether the last trial was with fewer threads
    };

    void watch(double seconds, int64_t interruptions);
    void judge(load &of, double seconds) const;

    std::map<int, load> loads_;
    load *running_ = nullptr;
    bool shared_ = false;
    int n_threads_ = 0;
    int64_t n_tokens_ = 1;
    double watched_ = 0, quiet_ = 0;  ///< seconds
    int64_t interruptions_ = 0;       ///< in `watched_`
};

}  // namespace agq
