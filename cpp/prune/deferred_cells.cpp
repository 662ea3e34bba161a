#include "prune/deferred_cells.h"

#include <algorithm>

#include "prune/early_tokens.h"

namespace agq {

namespace {

constexpr size_t one_in = 8, few = 64;

/// Reads the marks of one layer after another.
class mark_reader {
  public:
    explicit mark_reader(const graph_facts &facts) : facts_(facts) {}

    bool is_marked(const dropped_cell &d) {
        if (layer_ != d.first_layer) {
            layer_ = d.first_layer;
            keys_ = key_rows::of(facts_.sites[static_cast<size_t>(layer_)].cache);
            mark_ = deferral_mark(keys_);
        }
        return is_deferred(keys_, d.cell, mark_, d.stream);
    }

  private:
    const graph_facts &facts_;
    std::vector<char> mark_;
    key_rows keys_;
    int32_t layer_ = -1;
};

}  // namespace

bool deferred_cells::is_as_before(const graph_facts &facts, const std::vector<dropped_cell> &hidden) {
    const auto same = [](const dropped_cell &a, const dropped_cell &b) {
        return a.cell == b.cell && a.stream == b.stream && a.first_layer == b.first_layer;
    };
    const void *cache = facts.sites.back().cache->data;
    const bool is_same =
        last_cache_ == cache && std::equal(last_.begin(), last_.end(), hidden.begin(), hidden.end(), same);
    last_cache_ = cache;
    if (!is_same) return false;
    mark_reader marks(facts);
    const size_t step = hidden.size() > few ? one_in : 1;
    for (size_t i = ++turn_ % step; i < hidden.size(); i += step) {
        if (marks.is_marked(hidden[i]) != (is_marked_[i] != 0)) return false;
    }
    return true;
}

void deferred_cells::read_all(const graph_facts &facts, const std::vector<dropped_cell> &hidden) {
    last_ = hidden;
    is_marked_.resize(hidden.size());
    found_.clear();
    mark_reader marks(facts);
    for (size_t i = 0; i < hidden.size(); ++i) {
        is_marked_[i] = marks.is_marked(hidden[i]);
        if (is_marked_[i]) found_.push_back(hidden[i].cell);
    }
}

const std::vector<int32_t> &deferred_cells::find(const graph_facts &facts, const std::vector<dropped_cell> &hidden) {
    if (!is_as_before(facts, hidden)) read_all(facts, hidden);
    return found_;
}

}  // namespace agq
