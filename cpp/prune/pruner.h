// Token pruning (docs/pruning.md). For each graph of the host it decides how to run it: with ever fewer tokens, up to
// the first pruning layer only, with masks that hide dropped tokens, or unchanged.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "graph/ubatch.h"
#include "nodes/sequence_groups.h"
#include "prune/deferred_cells.h"
#include "prune/early_graph.h"
#include "prune/early_tokens.h"
#include "prune/hidden_cells.h"
#include "prune/masked_graph.h"
#include "prune/prune_plan.h"
#include "prune/pruned_run.h"
#include "prune/settings.h"
#include "prune/token_store.h"

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
    enum class work : uint8_t { keep, prune, defer };
    void plan_once();
    work decide(bool stores);
    work choose_work(bool stores);
    void warn_once(const std::string &obstacle);
    ggml_status run_pruned(bool stores, int n_threads, const segment_fn &segment);
    ggml_status run_deferred(const segment_fn &segment);
    ggml_status run_whole(ggml_tensor **nodes, int n, bool repeated, bool any_hidden, bool counts,
                          const compute_fn &compute);

    // The store (prune/token_store.h).
    bool asks();
    bool read_own();
    bool is_needed(const token_block &block) const;
    std::string find_deferral_obstacle();
    bool prepare_graph(const early_tokens &tokens);
    const std::vector<int32_t> &seen_deferred();
    size_t n_deferred() const;
    void warn_of_lost(size_t seen, size_t computed);
    ggml_status compute_deferred(std::vector<int32_t> open, const segment_fn &segment);
    void defer_again(const early_tokens &tokens);
    ggml_status run_shift(ggml_tensor **nodes, int n, bool repeated, const compute_fn &compute);
    void store_own();

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
    std::vector<std::vector<int32_t>> own_cells_;            ///< by kind: column of each token; empty: unknown
    pruned_run pruned_;
    ubatch_facts ubatch_;

    enum class answer : uint8_t { unknown, no, yes } asks_ = answer::unknown;  ///< whether the cuts look at heads
    int first_layer_ = 0;                                                      ///< the first pruning layer
    token_store store_;
    deferred_cells deferred_;
    key_rows keys_, next_keys_;  ///< of all cells, in the first pruning layer and the next one
    int64_t n_cells_ = 0;
    bool has_warned_of_lost_ = false;
    early_graph graph_;

    // The tokens of this ubatch.
    size_t site_ = 0;  ///< index of the attention of the first pruning layer
    std::vector<int32_t> cells_, positions_, ids_;
    std::shared_ptr<token_block> block_;
    token_record record_;
    early_work early_;
};

}  // namespace agq
