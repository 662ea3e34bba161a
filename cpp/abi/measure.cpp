// What the Python package asks about the machine: the kernels of this build, how fast one thread reads memory and
// multiplies, and how much memory is free. Needs no host.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "abi/export.h"
#include "base/environment.h"
#include "base/free_memory.h"
#include "base/thread_memory.h"
#include "kernels/select.h"

namespace {

/// Calls `work` at least once, and again until `seconds` have passed. `work` returns how much it did. Returns the work
/// per second.
template <class function>
double work_per_second(double seconds, function work) {
    using clock = std::chrono::steady_clock;
    const auto begun = clock::now();
    double done = 0;
    for (;;) {
        done += work();
        const std::chrono::duration<double> time = clock::now() - begun;
        if (time.count() >= seconds && time.count() > 0) return done / time.count();
    }
}

/// Sum of `n` words (a multiple of 8). Returning it keeps the compiler from removing the reads.
uint64_t sum_of(const uint64_t *words, int64_t n) {
    uint64_t sums[8] = {};  // independent sums, so that additions need not wait for one another
    for (int64_t i = 0; i < n; i += 8) {
        for (int j = 0; j < 8; j++) sums[j] += words[i + j];
    }
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    return sum;
}

/// A product that fits in one core's caches: a prompt's 8-bit activations times a few panels of 4-bit weights.
class small_product {
  public:
    explicit small_product(const agq::kernel &kern)
        : kern_(kern), panels_(4 * kern.panel_step), tokens_(8 * kern.nr), dst_(tokens_) {
        const size_t weights = sizeof(agq::half_tile) * panels_ * (columns / agq::group_columns);
        const size_t groups = static_cast<size_t>(columns / agq::group_columns) * tokens_;
        const size_t results = static_cast<size_t>(panels_) * agq::panel_rows * tokens_;
        memory_.reserve(weights + columns * static_cast<size_t>(tokens_) + 4 * (2 * groups + results), 1);
        auto *next = static_cast<unsigned char *>(memory_.of(0));
        const auto take = [&next](size_t bytes) {
            unsigned char *part = next;
            next += bytes;
            return part;
        };
        auto *tiles = reinterpret_cast<agq::tile *>(take(weights));
        std::memset(tiles, 0x35, weights);  // valid scales and codes; their values do not affect the time
        auto *q = take(columns * static_cast<size_t>(tokens_));
        std::memset(q, 3, columns * static_cast<size_t>(tokens_));
        auto *bias = reinterpret_cast<int32_t *>(take(4 * groups));
        auto *scale = reinterpret_cast<float *>(take(4 * groups));
        for (size_t i = 0; i < groups; i++) bias[i] = -64 * 3 * agq::group_columns, scale[i] = 0.01f;
        auto *out = reinterpret_cast<float *>(take(4 * results));
        for (int t = 0; t < tokens_; t++) dst_[t] = out + static_cast<size_t>(t) * panels_ * agq::panel_rows;
        for (int i = 0; i < 16; i++) codebook_[i] = static_cast<uint8_t>(4 + 8 * i);
        args_ = {tiles, columns, panels_, codebook_,  1.0f, true, reinterpret_cast<int8_t *>(q),
                 bias,  scale,   tokens_, dst_.data()};
    }

    /// Returns the number of operations; a multiplication and an addition count as two.
    double run() {
        kern_.gemm(args_);
        return 2.0 * columns * panels_ * agq::panel_rows * tokens_;
    }

  private:
    static constexpr int columns = 512;
    const agq::kernel &kern_;
    const int panels_, tokens_;
    std::vector<float *> dst_;
    agq::thread_memory memory_;
    uint8_t codebook_[16];
    agq::gemm_args args_;
};

const agq::kernel *chosen_kernel() {
    const std::string forced = agq::read_options().force_isa;
    return agq::select_kernel(forced.empty() ? nullptr : forced.c_str(), nullptr);
}

}  // namespace

/// The kernels of this build, best first; `index` counts from 0. Gets the kernel's name, whether this CPU and operating
/// system can run it, and whether it runs the products (1 or 0). Returns 1, or 0 if `index` is past the last kernel. No
/// kernel is chosen if AGQ_FORCE_ISA names one that cannot run.
AGQ_EXPORT int32_t agq_kernel(int32_t index, const char **name, int32_t *supported, int32_t *chosen) {
    const std::vector<const agq::kernel *> &all = agq::compiled_kernels();
    if (index < 0 || static_cast<size_t>(index) >= all.size()) return 0;
    const agq::kernel *kern = all[static_cast<size_t>(index)];
    *name = kern->name;
    *supported = kern->supported();
    *chosen = kern == chosen_kernel();
    return 1;
}

/// Reading speed of the calling thread in bytes per second. It reads `n` words of memory (a multiple of 8) repeatedly
/// for about `seconds`.
AGQ_EXPORT double agq_read_speed(const uint64_t *words, int64_t n, double seconds) {
    volatile uint64_t sink = 0;
    int64_t at = 0;
    const int64_t part = 1 << 17;  // the clock is checked after each part, so that a slow machine stops in time
    return work_per_second(seconds, [&] {
        const int64_t now = n - at < part ? n - at : part;
        sink = sink + sum_of(words + at, now);
        at = at + now < n ? at + now : 0;
        return static_cast<double>(sizeof(uint64_t)) * static_cast<double>(now);
    });
}

/// Operations per second of the chosen kernel in the calling thread (a multiplication and an addition count as two):
/// 8-bit activations times 4-bit weights, all operands in the caches, measured for about `seconds`. Returns 0 if no
/// kernel is chosen or memory runs out.
AGQ_EXPORT double agq_product_speed(double seconds) {
    const agq::kernel *kern = chosen_kernel();
    if (!kern) return 0;
    try {
        small_product product(*kern);
        product.run();  // loads the operands into the caches
        return work_per_second(seconds, [&product] { return product.run(); });
    } catch (const std::bad_alloc &) {
        return 0;
    }
}

/// Bytes that the process can still take before anything is swapped out or ended, with regard to the limits of its
/// control groups (containers). 0 if the system does not say.
AGQ_EXPORT int64_t agq_free_memory() {
    try {
        return static_cast<int64_t>(agq::read_memory_state().available);
    } catch (const std::bad_alloc &) {
        return 0;
    }
}
