// Token pruning (docs/pruning.md). For each graph of the host it decides how to run it: with ever fewer tokens, with
// masks that hide dropped ones, or unchanged.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "graph/ubatch.h"
#include "nodes/sequence_groups.h"
#include "prune/hidden_cells.h"
#include "prune/masked_graph.h"
#include "prune/prune_plan.h"
#include "prune/pruned_run.h"
#include "prune/settings.h"

namespace agq {

/// Pruning of one backend instance. Not thread-safe, like a ggml backend.
class pruner {
  public:
    pruner(const attention_kernel *kern, prune_settings settings)
        : kern_(kern), settings_(std::move(settings)), pruned_(kern) {}
    pruner(const pruner &) = delete;
    pruner &operator=(const pruner &) = delete;

    /// Computes nodes of the host, or copies of them. `repeated`: the nodes are those of the last call. `choices`:
    /// which keys their attentions look at.
    using compute_fn =
        std::function<ggml_status(ggml_tensor **nodes, int n, bool repeated, const key_choices &choices)>;

    /// Computes the host's graph in one or more calls of `compute`, which may use up to `n_threads` threads.
    /// `repeated`: the graph is that of the last run. Throws std::bad_alloc.
    ggml_status run(ggml_tensor **nodes, int n, bool repeated, int n_threads, const compute_fn &compute);

  private:
    void read_graph(ggml_tensor **nodes, int n);
    void divide(bool has_cache);
    std::vector<prune_stage> stages() const;
    std::vector<prune_stage> recorded() const;
    bool may_prune();
    void warn_once(const std::string &obstacle);

    const attention_kernel *kern_;
    const prune_settings settings_;
    std::set<std::string> warned_;

    // Of the latest graph.
    graph_facts facts_;
    prune_plan plan_;
    bool is_planned_ = false;
    masked_graph masked_;
    enum class form : uint8_t { none, host, masked, pruned } last_ = form::none;  ///< how the latest graph was computed

    hidden_cells hidden_;
    std::map<const ggml_tensor *, sequence_groups> groups_;  ///< by mask of the latest graph
    key_choices whole_;                                      ///< these groups
    std::vector<int32_t> own_cells_;                         ///< column of each token in the only mask; empty: unknown
    pruned_run pruned_;
    ubatch_facts ubatch_;
};

}  // namespace agq
