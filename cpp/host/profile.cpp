// Times are summed under a mutex: clock nodes are few, and exist only while profiling.
#include "host/profile.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <time.h>
#endif

namespace agq {

namespace {

struct kind {
    std::string label;
    int64_t nodes, nanoseconds;
};

std::atomic<profile_clock> chosen{profile_clock::off};
std::mutex kinds_mutex;
std::vector<kind> kinds;

}  // namespace

int64_t profile_time() {
#if defined(__unix__) || defined(__APPLE__)
    if (chosen.load(std::memory_order_relaxed) == profile_clock::cpu) {
        timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
    }
#endif
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

bool profile_enabled() {
    return chosen.load(std::memory_order_relaxed) != profile_clock::off;
}

void enable_profile(profile_clock clock) {
    const std::lock_guard<std::mutex> lock(kinds_mutex);
    if (clock != profile_clock::off) {
        // Graphs that are kept hold kind numbers, so kinds are never removed.
        for (kind &k : kinds) k.nodes = k.nanoseconds = 0;
    }
    chosen.store(clock, std::memory_order_relaxed);
}

int profile_kind(const std::string &label) {
    const std::lock_guard<std::mutex> lock(kinds_mutex);
    for (size_t i = 0; i < kinds.size(); ++i) {
        if (kinds[i].label == label) return static_cast<int>(i);
    }
    kinds.push_back({label, 0, 0});
    return static_cast<int>(kinds.size()) - 1;
}

void add_profile_time(const std::string &label, int64_t nanoseconds) {
    const size_t number = static_cast<size_t>(profile_kind(label));
    const std::lock_guard<std::mutex> lock(kinds_mutex);
    ++kinds[number].nodes;
    kinds[number].nanoseconds += nanoseconds;
}

std::string profile_report() {
    const std::lock_guard<std::mutex> lock(kinds_mutex);
    std::string report;
    for (const kind &k : kinds) {
        if (k.nodes == 0) continue;
        report += k.label + '\t' + std::to_string(k.nodes) + '\t' + std::to_string(k.nanoseconds) + '\n';
    }
    return report;
}

void clock_node(ggml_tensor *, int ith, int, void *userdata) {
    // Thread 0 takes part in every node of a graph, so only its time is kept.
    thread_local int64_t last;
    if (ith != 0) return;
    const int64_t reached = profile_time();
    const int number = *static_cast<const int *>(userdata);
    if (number >= 0) {
        const std::lock_guard<std::mutex> lock(kinds_mutex);
        kind &k = kinds[static_cast<size_t>(number)];
        ++k.nodes;
        k.nanoseconds += reached - last;
    }
    last = profile_time();
}

std::string profile_label(const ggml_tensor *node) {
    std::string label = host.ggml_op_name(node->op);
    const ggml_tensor *weights = node->src[0];
    if ((node->op != host.op_mul_mat && node->op != host.op_mul_mat_id) || !weights) return label;
    std::string name(weights->name, strnlen(weights->name, sizeof(weights->name)));
    // blk.17.ffn_up.weight: the layer does not matter here.
    if (name.compare(0, 4, "blk.") == 0) name = name.substr(name.find('.', 4) + 1);
    const size_t end = name.rfind(".weight");
    return end == std::string::npos ? label : label + ' ' + name.substr(0, end);
}

}  // namespace agq
