// Tests how the distance of prefetches is chosen, with a machine made of numbers.
#include "nodes/fetch_tuner.h"

#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace {

using agq::fetch_tuner;

constexpr int64_t unit = 1 << 18;  // bytes
const char matrices[32] = {};      // only their addresses count

int failures = 0;

void check(bool good, const char *what) {
    if (!good) std::printf("failed: %s\n", what);
    failures += !good;
}

/// Reads all weights once; `nanoseconds(choice)` is what a unit takes.
template <class function>
void read_model(fetch_tuner &tuner, const function &nanoseconds) {
    for (const char &matrix : matrices) {
        for (int i = 0; i < 8; ++i) {
            const int choice = tuner.choice();
            tuner.record(choice, &matrix, unit, nanoseconds(choice));
        }
    }
}

template <class function>
int chosen(const function &nanoseconds) {
    fetch_tuner tuner;
    for (int i = 0; i < 16; ++i) read_model(tuner, nanoseconds);
    check(!tuner.is_measuring(), "fifteen turns of each choice are enough");
    return tuner.choice();
}

}  // namespace

int main() {
    const auto speeds = [](int64_t first, int64_t second, int64_t third) {
        return [=](int choice) { return choice == 0 ? first : choice == 1 ? second : third; };
    };
    check(chosen(speeds(10000, 12000, 11000)) == 0, "the default where it is fastest");
    check(chosen(speeds(10000, 9000, 9500)) == 1, "another where that is faster");
    check(chosen(speeds(10000, 9500, 9000)) == 2, "the fastest of the others");
    check(chosen(speeds(10000, 9900, 9850)) == 0, "the default unless another gains 2%");

    std::mt19937 rng(1);
    const auto sometimes = [&](int choice) { return (choice == 1 ? 9000 : 10000) * (rng() % 300 == 0 ? 20 : 1); };
    check(chosen(sometimes) == 1, "some interruptions do not hide a gain");
    const auto often = [&](int) { return 10000 * (rng() % 8 == 0 ? 20 : 1); };
    check(chosen(often) == 0, "many interruptions feign none");

    {
        fetch_tuner tuner;
        // While pages come into memory, all is slow, and whatever comes first is slowest.
        read_model(tuner, [](int choice) { return choice == 0 ? 90000 : 80000; });
        for (int i = 0; i < 15; ++i) read_model(tuner, speeds(10000, 12000, 12000));
        check(!tuner.is_measuring() && tuner.choice() == 0, "the first reading does not count");
    }
    {
        fetch_tuner tuner;
        std::vector<std::thread> threads;
        threads.reserve(4);
        for (int t = 0; t < 4; ++t) {
            threads.emplace_back([&] {
                for (int i = 0; i < 16; ++i) read_model(tuner, speeds(10000, 12000, 9000));
            });
        }
        for (std::thread &thread : threads) thread.join();
        check(!tuner.is_measuring() && tuner.choice() == 2, "several threads");
    }
    {
        fetch_tuner tuner;
        for (int i = 0; i < 100000; ++i) tuner.record(0, &tuner, 0, 1000);
        check(tuner.is_measuring() && tuner.choice() == 0, "nothing read, nothing decided");
    }
    return failures > 0;
}
