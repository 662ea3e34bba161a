#include "backend/thread_choice.h"

#include <algorithm>

namespace agq {

namespace {

constexpr double window = 0.1;         ///< seconds over which interruptions are counted
constexpr double many = 40, few = 10;  ///< interruptions per second: cores are shared; they are not
constexpr double quiet_window = 1.0;   ///< seconds with few of them, until cores count as free
constexpr int trial_graphs = 4;        ///< graphs for each number of threads that is tried
constexpr int graphs_between = 64;     ///< from trial to trial
constexpr double better = 0.93;        ///< another number of threads must take this share of the time

/// Graphs of about the same number of tokens share a number.
int size_class(int64_t n_tokens) {
    int power = 0;
    for (; n_tokens > 1; n_tokens /= 4) ++power;
    return power;
}

}  // namespace

int thread_choice::threads(int n_threads, int64_t n_tokens) {
    if (n_threads != n_threads_) loads_.clear();
    n_threads_ = n_threads;
    n_tokens_ = std::max<int64_t>(n_tokens, 1);
    running_ = nullptr;
    if (!shared_ || n_threads < 2) return n_threads;
    running_ = &loads_[size_class(n_tokens_)];
    if (running_->chosen.threads == 0) running_->chosen.threads = n_threads;
    return running_->tried.threads ? running_->tried.threads : running_->chosen.threads;
}

void thread_choice::record(double seconds, int64_t interruptions) {
    if (running_) judge(*running_, seconds / static_cast<double>(n_tokens_));
    watch(seconds, interruptions);
}

/// Decides whether the cores are shared.
void thread_choice::watch(double seconds, int64_t interruptions) {
    watched_ += seconds;
    interruptions_ += interruptions;
    if (watched_ < window) return;
    const double rate = static_cast<double>(interruptions_) / watched_;
    quiet_ = rate < few ? quiet_ + watched_ : 0;
    watched_ = 0;
    interruptions_ = 0;
    if (rate > many) {
        shared_ = true;
    } else if (quiet_ > quiet_window) {
        shared_ = false;
        loads_.clear();
    }
}

/// Adds the time of a graph; begins and ends trials of half or twice as many threads.
void thread_choice::judge(load &of, double seconds) const {
    trial &at = of.tried.threads ? of.tried : of.chosen;
    at.seconds += (seconds - at.seconds) / ++at.graphs;
    ++of.graphs;
    if (of.tried.threads) {
        if (at.graphs < trial_graphs) return;
        if (of.tried.seconds < better * of.chosen.seconds) of.chosen = of.tried;
        of.tried = {};
        of.chosen.graphs = of.graphs = 0;
    } else if (of.graphs >= graphs_between || (of.trials == 0 && of.graphs >= trial_graphs)) {
        ++of.trials;
        of.fewer = of.chosen.threads == n_threads_ || (of.chosen.threads > 1 && !of.fewer);
        of.tried.threads = of.fewer ? of.chosen.threads / 2 : std::min(2 * of.chosen.threads, n_threads_);
    }
}

}  // namespace agq
