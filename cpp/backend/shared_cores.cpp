#include "backend/shared_cores.h"

#include <chrono>

#ifdef __linux__
#include <sys/resource.h>
#endif

namespace agq {

namespace {

int64_t nanoseconds() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

/// How often this thread lost its core to another one; 0 where the system does not say.
int64_t interruptions_of_thread() {
#ifdef __linux__
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
#else
    return 0;
#endif
}

}  // namespace

shared_cores::shared_cores(wait_mode mode) : mode_(mode) {
    if (mode_ == wait_mode::sleep) waits_.turn_on();
}

int shared_cores::begin(int n_threads, int64_t n_tokens) {
    if (mode_ != wait_mode::automatic) return n_threads;
    interruptions_ = interruptions_of_thread();
    begun_ = nanoseconds();
    return choice_.threads(n_threads, n_tokens);
}

void shared_cores::end() {
    if (mode_ != wait_mode::automatic) return;
    const double seconds = static_cast<double>(nanoseconds() - begun_) * 1e-9;
    choice_.record(seconds, interruptions_of_thread() - interruptions_);
    if (choice_.shared()) {
        waits_.turn_on();
    } else {
        waits_.turn_off();
    }
}

}  // namespace agq
