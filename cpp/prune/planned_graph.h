// The host's latest graph, what settings or the file say about pruning it, and where it can be cut.
#pragma once

#include <utility>
#include <vector>

#include "graph/graph_facts.h"
#include "kernels/attention.h"
#include "prune/prune_plan.h"
#include "prune/settings.h"

namespace agq {

class planned_graph {
  public:
    planned_graph(const attention_kernel *kern, prune_settings settings)
        : kern_(kern), settings_(std::move(settings)) {}

    /// Reads a new graph. `dims`: what counts its tokens, if that is known already, else empty. Throws std::bad_alloc.
    void read(ggml_tensor **nodes, int n, std::vector<token_dim> dims = {});
    /// Whether its tokens can be told from other extents even if there is only one.
    bool counts_one() const { return !dims_.empty(); }
    const graph_facts &facts() const { return facts_; }
    const prune_settings &settings() const { return settings_; }
    /// What to do after which layers, by ascending layer. Throws std::bad_alloc.
    std::vector<prune_stage> stages() const;
    /// Plans the cuts of this graph when it is first asked for. Throws std::bad_alloc.
    const prune_plan &plan();
    /// Whether the cuts of this graph look at heads and leave no states, so that tokens can wait for their question.
    bool asks() const;

  private:
    const std::vector<prune_stage> &recorded() const;

    const attention_kernel *kern_;
    const prune_settings settings_;
    graph_facts facts_;
    std::vector<token_dim> dims_;
    prune_plan plan_;
    bool is_planned_ = false;
    /// The file's records. A model's graphs read the same weights, and looking for records in all of them takes long.
    mutable std::vector<const ggml_tensor *> weights_;
    mutable std::vector<prune_stage> records_;
};

}  // namespace agq
