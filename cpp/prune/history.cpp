#include "prune/history.h"

#include "base/thread_value.h"

namespace agq {

namespace {

constexpr size_t most_positions = size_t{1} << 22;  // the host chooses positions, so they are limited

}  // namespace

bool prune_history::begin_at(int32_t position, size_t n) {
    const size_t begin = static_cast<size_t>(position);
    if (position < 0 || begin + n > most_positions) return false;
    layers_.resize(begin, -1);
    return true;
}

void prune_history::record(int32_t position, const std::vector<int32_t> &layer_of_token) {
    if (begin_at(position, layer_of_token.size()))
        layers_.insert(layers_.end(), layer_of_token.begin(), layer_of_token.end());
}

void prune_history::record_kept(int32_t position, size_t n) {
    if (begin_at(position, n)) layers_.resize(layers_.size() + n, -1);
}

void prune_history::record_at(int32_t position, int32_t layer) {
    if (position >= 0 && static_cast<size_t>(position) < layers_.size()) layers_[static_cast<size_t>(position)] = layer;
}

prune_history &prune_history::of_thread() {
    return thread_value<prune_history, prune_history>();
}

}  // namespace agq
