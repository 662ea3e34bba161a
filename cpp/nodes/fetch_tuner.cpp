#include "nodes/fetch_tuner.h"

#include <algorithm>
#include <functional>

namespace agq {

namespace {

constexpr int64_t turn_bytes = 8 << 20;
constexpr size_t turns = 15;                            // of each choice
constexpr int64_t longest_reading = int64_t{32} << 30;  // a matrix that does not come again by then is gone
constexpr double worth = 1.02;

/// The gain over `usual` that three of four rounds exceed. Speeds of one round were measured one after the other, so
/// what disturbs the machine for longer disturbs both.
double sure_gain(const std::vector<double> &speeds, const std::vector<double> &usual) {
    std::vector<double> gains(speeds.size());
    std::transform(speeds.begin(), speeds.end(), usual.begin(), gains.begin(), std::divides<>());
    const auto quarter = gains.begin() + static_cast<std::ptrdiff_t>(gains.size() / 4);
    std::nth_element(gains.begin(), quarter, gains.end());
    return *quarter;
}

}  // namespace

fetch_tuner &fetch_tuner::of_process() {
    static fetch_tuner tuner;
    return tuner;
}

bool fetch_tuner::is_first_reading(const void *matrix, int64_t bytes) {
    if (readings_ > 1) return false;
    if (!first_ || skipped_ > longest_reading) {
        first_ = matrix;
        skipped_ = 0;
        readings_ = 0;
    }
    skipped_ += bytes;
    if (matrix == first_ && latest_ != first_) ++readings_;
    latest_ = matrix;
    return readings_ < 2;
}

void fetch_tuner::record(int choice, const void *matrix, int64_t bytes, int64_t nanoseconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!is_measuring() || is_first_reading(matrix, bytes) || choice != this->choice()) return;
    bytes_ += bytes;
    nanoseconds_ += nanoseconds;
    if (bytes_ < turn_bytes || nanoseconds_ <= 0) return;
    speeds_[choice].push_back(static_cast<double>(bytes_) / static_cast<double>(nanoseconds_));
    bytes_ = nanoseconds_ = 0;
    const bool all =
        std::all_of(std::begin(speeds_), std::end(speeds_), [](const auto &s) { return s.size() == turns; });
    if (all) {
        finish();
    } else {
        choice_ = (choice + 1) % n_fetch_choices;
    }
}

void fetch_tuner::finish() {
    int best = 0;
    double best_gain = worth;
    for (int i = 1; i < n_fetch_choices; ++i) {
        const double gain = sure_gain(speeds_[i], speeds_[0]);
        if (gain > best_gain) {
            best = i;
            best_gain = gain;
        }
    }
    choice_ = best;
    measuring_ = false;
}

}  // namespace agq
