// Tests how the number of threads is chosen while cores are shared, with a machine made of numbers.
#include "backend/thread_choice.h"

#include <cstdio>

namespace {

using agq::thread_choice;

int failures = 0;

void check(bool good, const char *what) {
    if (!good) std::printf("failed: %s\n", what);
    failures += !good;
}

/// Runs `graphs` graphs of one token; graph i with n threads takes seconds(n). Returns how many ran with one thread.
template <class function>
int run(thread_choice &choice, int n_threads, int graphs, double interruptions_per_second, const function &seconds) {
    int alone = 0;
    double owed = 0;
    for (int i = 0; i < graphs; i++) {
        const int threads = choice.threads(n_threads, 1);
        check(threads >= 1 && threads <= n_threads, "between one thread and all");
        alone += threads == 1;
        const double time = seconds(threads);
        owed += time * interruptions_per_second;
        choice.record(time, static_cast<int64_t>(owed));
        owed -= static_cast<double>(static_cast<int64_t>(owed));
    }
    return alone;
}

}  // namespace

int main() {
    const auto fewer_is_faster = [](int threads) { return threads == 1 ? 0.01 : 0.03; };
    const auto more_is_faster = [](int threads) { return 0.02 / threads; };
    {
        thread_choice choice;
        check(run(choice, 2, 500, 2, fewer_is_faster) == 0 && !choice.shared(), "a free machine uses all threads");
    }
    {
        thread_choice choice;
        check(run(choice, 2, 500, 100, fewer_is_faster) > 400 && choice.shared(), "one thread where that is faster");
        check(run(choice, 2, 500, 0, more_is_faster) < 200 && !choice.shared(), "all threads when the machine is free");
        check(run(choice, 2, 100, 0, more_is_faster) == 0, "and no trial any more");
    }
    {
        thread_choice choice;
        const int alone = run(choice, 2, 1000, 100, more_is_faster);
        check(choice.shared() && alone > 0 && alone < 150, "two threads where that is faster, but for trials");
    }
    {
        thread_choice choice;  // one of four threads is best: found in steps
        run(choice, 4, 1000, 100, [](int threads) { return 0.01 * threads; });
        check(run(choice, 4, 128, 100, [](int threads) { return 0.01 * threads; }) > 110, "from four threads to one");
    }
    {
        thread_choice choice;  // the machine changes its mind
        run(choice, 2, 1000, 100, fewer_is_faster);
        run(choice, 2, 300, 100, more_is_faster);
        check(run(choice, 2, 128, 100, more_is_faster) < 20, "back to two threads");
    }
    {
        thread_choice choice;
        check(run(choice, 1, 300, 100, fewer_is_faster) == 300, "one thread stays one");
    }
    if (!failures) std::puts("passed");
    return failures != 0;
}
