#include "prune/deferred_cells.h"

#include <algorithm>

#include "prune/early_tokens.h"

namespace agq {

namespace {

constexpr size_t one_in = 8, few = 64;

/// Reads the marks of the layers behind the cuts. There are few of these.
class mark_reader {
  public:
    explicit mark_reader(const graph_facts &facts) : facts_(facts) {}

    bool is_marked(const dropped_cell &d) {
        const layer_marks &layer = marks_of(d.first_layer);
        return is_deferred(layer.keys, d.cell, layer.mark, d.stream);
    }

  private:
    struct layer_marks {
        int32_t layer;
        key_rows keys;
        std::vector<char> mark;
    };

    const layer_marks &marks_of(int32_t layer) {
        for (const layer_marks &known : layers_) {
            if (known.layer == layer) return known;
        }
        const key_rows keys = key_rows::of(facts_.sites[static_cast<size_t>(layer)].cache);
        return layers_.emplace_back(layer_marks{layer, keys, deferral_mark(keys)});
    }

    const graph_facts &facts_;
    std::vector<layer_marks> layers_;
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
