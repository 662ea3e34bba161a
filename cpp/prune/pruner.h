// Token pruning (docs/pruning.md). For each graph of the host it decides how to run it: with ever fewer tokens, with
// masks that hide dropped tokens, or unchanged. Each sequence of a ubatch is treated as if it were alone.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "nodes/sequence_groups.h"
#include "prune/hidden_cells.h"
#include "prune/masked_graph.h"
#include "prune/planned_graph.h"
#include "prune/pruned_run.h"
#include "prune/settings.h"
#include "prune/stream_graph.h"
#include "prune/waiting_tokens.h"

namespace agq {

/// Pruning of one backend instance. Not thread-safe, like a ggml backend.
class pruner {
  public:
    pruner(const attention_kernel *kern, prune_settings settings)
        : graph_(kern, std::move(settings)), pruned_(kern), waiting_(&graph_, &hidden_) {}
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
    void read_graph(ggml_tensor **nodes, int n, std::vector<token_dim> dims = {});
    bool needs_streams(bool any_hidden);
    ggml_status run_streams(int n_threads, const compute_fn &compute);
    ggml_status run_graph(ggml_tensor **nodes, int n, bool repeated, bool has_cache, bool any_hidden, int n_threads,
                          const compute_fn &compute);
    void group(bool has_cache);
    bool divide(bool may_wait);
    std::string choose_work(const ubatch_part &part, bool may_wait, part_work *work);
    void warn_once(const std::string &obstacle);
    ggml_status compute_open(const divided_ubatch *divided, bool may_wait, bool *any_hidden, const segment_fn &segment);
    ggml_status run_divided(int n_threads, const segment_fn &segment);
    ggml_status run_whole(ggml_tensor **nodes, int n, bool repeated, bool any_hidden, bool has_cache,
                          const compute_fn &compute);
    const graph_facts &facts() const { return graph_.facts(); }

    std::set<std::string> warned_;

    // Of the latest graph.
    planned_graph graph_;
    bool is_of_host_ = false;  ///< not of a single stream
    stream_graph streams_;
    masked_graph masked_;
    enum class form : uint8_t { none, host, masked, divided } last_ = form::none;  ///< how it was computed

    hidden_cells hidden_;
    std::map<const ggml_tensor *, sequence_groups> groups_;  ///< by mask of the latest graph
    key_choices whole_;                                      ///< these groups
    std::vector<std::vector<int32_t>> own_cells_;            ///< by kind: column of each token; empty: unknown
    pruned_run pruned_;
    waiting_tokens waiting_;
    divided_ubatch ubatch_;
};

}  // namespace agq
