#include "backend/weight_pages.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <vector>

#include "base/huge_pages.h"

namespace agq {

namespace {

constexpr size_t worthwhile = size_t{32} << 20;  // bytes; caches hold much of a smaller model anyway

/// The matrix that the node multiplies with, if it is a weight of the model.
const ggml_tensor *weights_of(const ggml_tensor *node) {
    if (node->op != host.op_mul_mat && node->op != host.op_mul_mat_id) return nullptr;
    const ggml_tensor *w = node->src[0];
    return w && w->op == host.op_none && w->data && !w->view_src ? w : nullptr;
}

/// "585 MB".
std::string megabytes(size_t bytes) {
    return std::to_string((bytes + 500000) / 1000000) + " MB";
}

}  // namespace

void weight_pages::move(ggml_tensor *const *nodes, int n, int n_threads) {
    if (mode_ == huge_pages_mode::off) return;
    std::vector<memory_range> ranges;
    size_t total = 0;
    for (int i = 0; i < n; ++i) {
        const ggml_tensor *w = weights_of(nodes[i]);
        if (!w || !seen_.insert(w->data).second) continue;
        ranges.push_back({w->data, host.ggml_nbytes(w)});
        total += ranges.back().size;
    }
    const bool always = mode_ == huge_pages_mode::on;
    if (ranges.empty() || (total < worthwhile && !always)) return;

    static std::mutex one_at_a_time;  // contexts of one model would copy the same matrices
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto begun = std::chrono::steady_clock::now();
    const huge_pages_result result = move_to_huge_pages(ranges, n_threads, always);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
    char time[32];
    std::snprintf(time, sizeof(time), "%.2f s", seconds.count());
    if (result.collapsed > 0) {
        log_line(log_info, "joined the pages of " + megabytes(result.collapsed) + " of weights into huge pages (" +
                               time + "); AGQ_HUGE_PAGES=off leaves them as they are");
    }
    if (result.copied > 0) {
        log_line(log_info, "copied " + megabytes(result.copied) + " of weights from the mapped file into huge pages (" +
                               time + "); AGQ_HUGE_PAGES=off leaves them in the file");
    }
    if (!result.obstacle.empty()) {
        log_line(always ? log_warn : log_info, "weights are not in huge pages: " + result.obstacle);
    }
}

}  // namespace agq
