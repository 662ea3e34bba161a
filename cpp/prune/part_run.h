// One part of a ubatch in a pruned run: which of its tokens are left, and the choice of those that leave. Each part is
// measured and chosen by itself, as if its sequence were alone.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "graph/ubatch.h"
#include "prune/early_graph.h"
#include "prune/hidden_cells.h"
#include "prune/part_work.h"
#include "prune/prune_plan.h"
#include "prune/run_nodes.h"
#include "scores/heads.h"
#include "scores/score.h"

namespace agq {

/// What the parts of a run have in common.
struct run_input {
    const graph_facts &facts;
    const prune_plan &plan;  ///< without an obstacle
    const hidden_cells &hidden;
    bool mask_only;  ///< all tokens stay in the graph, but dropped ones are hidden
    const ubatch_facts &ubatch;
    const ubatch_work &work;
    int n_threads;
};

/// Reuses its memory from run to run.
class part_run {
  public:
    explicit part_run(const attention_kernel *kern) : kern_(kern) {}
    part_run(const part_run &) = delete;
    part_run &operator=(const part_run &) = delete;

    /// Begins a run; `index` is the number of the part. Throws std::bad_alloc.
    void begin(const run_input &in, size_t index);
    const ubatch_part &part() const { return *part_; }
    const part_work &work() const { return *work_; }
    bool chooses() const { return work_->what == part_work::kind::prune && !alive_.empty(); }
    bool defers() const { return work_->what == part_work::kind::defer; }

    /// Whether its attentions pack their keys. Otherwise the prompt's results, and with them the choice of tokens,
    /// would depend on how many of its tokens are in one ubatch.
    bool packs() const { return work_->what != part_work::kind::keep; }

    /// Tokens of the ubatch that are not dropped, ascending.
    const std::vector<int32_t> &alive() const { return alive_; }
    /// Candidates of earlier ubatches that are not dropped, ascending.
    const std::vector<int32_t> &early_alive() const { return early_alive_; }
    /// The same after so many cuts.
    const std::vector<int32_t> &early_alive_after(size_t cuts) const {
        return cuts < early_before_.size() ? early_before_[cuts] : early_alive_;
    }
    early_pass &early() { return early_; }

    /// Adds the node that measures the score of a cut. `source` has the queries of all tokens that are left in the
    /// graph, those of this part from row `first_row` on; and the keys that this part sees. Throws std::bad_alloc.
    void add_meter(const run_input &in, const prune_cut &cut, const score_source &source, int64_t first_row,
                   run_nodes *to);
    /// The same for the heads of one attention.
    void add_probe(const run_input &in, const head_site &heads, const score_source &source, int64_t first_row,
                   run_nodes *to);
    /// Adds the node that stores the queries `q` of a deferred part's last tokens, before the attention uses their
    /// memory again. Throws std::bad_alloc.
    void add_store_of_queries(const run_input &in, int site, const ggml_tensor *q, run_nodes *to) const;
    /// Keeps what the probe of these heads has measured. Throws std::bad_alloc.
    void keep_weights(const run_input &in, const head_site &heads);
    /// Drops tokens. Throws std::bad_alloc.
    void choose(const run_input &in, const prune_cut &cut);
    /// All tokens leave the graph, to wait.
    void leave() { alive_.clear(); }

    /// For each token of the part, the layer after which it was dropped, or -1.
    const std::vector<int32_t> &layer_of_token() const { return layer_of_token_; }
    /// The same for the candidates of earlier ubatches.
    const std::vector<int32_t> &layer_of_early() const { return layer_of_early_; }
    /// By pruning layer, the importance of the candidates and of each token of the part: NaN if it was dropped before,
    /// infinity if protected.
    const std::map<int, std::vector<float>> &importance() const { return importance_; }
    /// By head, the largest attention that the candidates and each token of the part got from the last ones; NaN if it
    /// was dropped before. Of the heads that the cuts look at.
    const std::map<attention_head, std::vector<float>> &head_weights() const { return head_weights_; }

  private:
    score_meter &meter_of(const prune_cut &cut);
    std::vector<int32_t> places() const;
    void set_tokens(const run_input &in, int kind, int64_t first_row, score_meter *meter) const;
    void add_observers(const run_input &in, int site, score_source *source, score_meter *meter, run_nodes *to);
    std::vector<uint8_t> find_protected(const prune_cut &cut, const std::vector<int32_t> &left) const;
    std::vector<int32_t> find_leaving(const run_input &in, const prune_cut &cut, const std::vector<int32_t> &left,
                                      const std::vector<float> &importance,
                                      const std::vector<uint8_t> &is_protected) const;
    std::vector<float> measured(const run_input &in, const prune_cut &cut, const std::vector<int32_t> &left,
                                const std::vector<uint8_t> &is_protected);

    const attention_kernel *kern_;
    std::map<const score *, std::unique_ptr<score_meter>> meters_;
    std::map<int, head_probe> probes_;  ///< by site
    const ubatch_facts *ubatch_ = nullptr;
    const ubatch_part *part_ = nullptr;
    const part_work *work_ = nullptr;
    early_pass early_;
    std::vector<int32_t> alive_, early_alive_, layer_of_token_, layer_of_early_;
    std::vector<std::vector<int32_t>> early_before_;  ///< by cut: early_alive_ in front of it
    std::map<int, std::vector<float>> importance_;
    std::map<attention_head, std::vector<float>> head_weights_;
};

}  // namespace agq
