#include "backend/cache_pages.h"

#include <string>
#include <vector>

#include "base/huge_pages.h"
#include "graph/graph_facts.h"

namespace agq {

void cache_pages::renew(ggml_tensor *const *nodes, int n) {
    if (mode_ == huge_pages_mode::off) return;
    std::vector<memory_range> ranges;
    for (int i = 0; i < n; ++i) {
        if (nodes[i]->op != host.op_set_rows) continue;
        const ggml_tensor *cache = root_of(nodes[i]);
        if (cache->op != host.op_none) continue;  // a value of the graph: experts are chosen with this operation, too
        if (cache->data && seen_.insert(cache->data).second) ranges.push_back({cache->data, host.ggml_nbytes(cache)});
    }
    if (ranges.empty()) return;
    const size_t renewed = renew_in_huge_pages(ranges);
    if (renewed == 0) return;
    log_line(log_info, "keys and values get huge pages (" + std::to_string(renewed >> 20) +
                           " MiB); AGQ_HUGE_PAGES=off leaves them as they are");
}

}  // namespace agq
