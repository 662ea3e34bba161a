#include "backend/graph_snapshot.h"

#include <algorithm>
#include <cstring>

namespace agq {

namespace {

constexpr size_t node_bytes = offsetof(ggml_tensor, name);

}  // namespace

bool graph_snapshot::is_repeated(ggml_tensor **nodes, int n) {
    const size_t count = static_cast<size_t>(n);
    bool same = n > 0 && count == nodes_.size() && std::equal(nodes_.begin(), nodes_.end(), nodes);
    for (size_t i = 0; same && i < count; ++i) {
        same = std::memcmp(nodes[i], &content_[i * node_bytes], node_bytes) == 0;
    }
    if (same) return true;
    nodes_.clear();  // if memory runs out below, the next graph counts as new
    content_.resize(count * node_bytes);
    for (size_t i = 0; i < count; ++i) std::memcpy(&content_[i * node_bytes], nodes[i], node_bytes);
    nodes_.assign(nodes, nodes + n);
    return false;
}

}  // namespace agq
