// Runs one prompt with ever fewer tokens. Each segment of the graph ends after the attention of a pruning layer.
// Between segments, tokens are chosen and the needed copies are made.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "graph/ubatch.h"
#include "nodes/attention.h"
#include "prune/cut_job.h"
#include "prune/early_graph.h"
#include "prune/early_tokens.h"
#include "prune/graph_copy.h"
#include "prune/hidden_cells.h"
#include "prune/prune_plan.h"
#include "scores/heads.h"
#include "scores/score.h"

namespace agq {

/// What a run has to do with tokens of earlier ubatches and with the store.
struct early_work {
    early_graph *graph = nullptr;          ///< null: there are no candidates
    early_tokens tokens;                   ///< the candidates are those that are missing
    bool keeps_own = false;                ///< tokens of the ubatch stay, because it is short
    const token_record *record = nullptr;  ///< at the first cut; null: the ubatch is not stored
    std::vector<char *> records;           ///< where to store that of each token of the ubatch
    std::vector<char> mark;                ///< of deferred tokens
    token_block *block = nullptr;          ///< where to store the queries of the last tokens, if the ubatch is deferred
};

/// Reuses its memory from run to run.
class pruned_run {
  public:
    explicit pruned_run(const attention_kernel *kern) : kern_(kern) {}
    pruned_run(const pruned_run &) = delete;
    pruned_run &operator=(const pruned_run &) = delete;

    /// Runs the cuts of `plan`, which must have no obstacle, for the ubatch that read_ubatch has read. `mask_only`: all
    /// tokens stay in the graph, but dropped ones are hidden. Tokens of earlier ubatches are chosen and computed
    /// together with those of this one. `whole`: the groups of the host's masks. Throws std::bad_alloc.
    ggml_status run(const graph_facts &facts, const prune_plan &plan, const hidden_cells &hidden, bool mask_only,
                    const ubatch_facts &ubatch, const key_choices &whole, const early_work &early, int n_threads,
                    const segment_fn &compute);
    /// Runs the ubatch only up to the first cut, stores its records and marks its tokens as deferred in all later
    /// layers. Throws std::bad_alloc.
    ggml_status defer(const graph_facts &facts, const prune_plan &plan, const hidden_cells &hidden,
                      const ubatch_facts &ubatch, const key_choices &whole, const early_work &early,
                      const segment_fn &compute);

    /// For each token of the ubatch, the layer after which it was dropped, or -1.
    const std::vector<int32_t> &layer_of_token() const { return layer_of_token_; }
    /// The same for the candidates of earlier ubatches.
    const std::vector<int32_t> &layer_of_early() const { return layer_of_early_; }
    /// By pruning layer, the importance of the candidates and of each token of the ubatch: NaN if it was dropped
    /// before, infinity if protected.
    const std::map<int, std::vector<float>> &importance() const { return seen_importance_; }
    /// By head, the largest attention that the candidates and each token of the ubatch got from the last ones; NaN if
    /// it was dropped before. Of the heads that the cuts look at.
    const std::map<attention_head, std::vector<float>> &head_weights() const { return head_weights_; }

  private:
    struct call;

    void begin(const call &c);
    void add_record(const call &c, cut_job *job) const;
    std::vector<int32_t> places() const;
    void add_observers(const call &c, int site, score_source *source, score_meter *meter);
    void keep_queries(const call &c, int site);
    ggml_tensor *mask_of(const call &c, int site);
    ggml_tensor *make_mask(const call &c, int level);
    std::vector<int32_t> visible_cells(const call &c, int kind, const std::vector<int32_t> &hidden) const;
    ggml_status run_segment(const call &c, size_t segment);
    score_meter &meter_of(const prune_cut &cut);
    void prepare_meter(const call &c, const prune_cut &cut);
    void prepare(const call &c, int site, score_source source, score_meter *measures);
    std::vector<float> measured(const call &c, const prune_cut &cut, const std::vector<uint8_t> &is_protected);
    void keep_head_weights(const call &c);
    void choose(const call &c, const prune_cut &cut);
    void apply_cut(const call &c, const prune_cut &cut);
    void add_clears(const call &c, const prune_cut &cut);
    void spread_last_states(const call &c) const;

    const attention_kernel *kern_;
    tensor_arena arena_;
    graph_copy copy_;
    graph_copy states_;                       ///< for dropped tokens, for the next segment
    std::vector<ggml_tensor *> first_nodes_;  ///< nodes at the start of a segment, after the copies
    std::map<const score *, std::unique_ptr<score_meter>> meters_;
    std::map<int, head_probe> probes_;           ///< by site; their memory is kept
    std::vector<const head_site *> probed_now_;  ///< in this segment
    std::map<attention_head, std::vector<float>> head_weights_;
    cut_job job_;                              ///< of the next segment
    std::deque<std::vector<int32_t>> lists_;   ///< that job_ and choices_ point to
    std::deque<std::vector<uint8_t>> spared_;  ///< likewise
    std::deque<cut_job> observers_;            ///< of this segment: queries of earlier tokens
    key_choices choices_;                      ///< by the masks of this run
    std::vector<ggml_tensor *> nodes_;
    std::vector<ggml_tensor *> masks_;  ///< of this segment, by level; null: not made yet
    int64_t rows_ = 0;                  ///< tokens in the graph; with mask_only all
    std::vector<int32_t> alive_;        ///< tokens that are not dropped, ascending
    std::vector<int32_t> early_alive_;  ///< candidates that are not dropped, ascending
    std::vector<int32_t> gone_;         ///< tokens that leave no keys, in the order in which they were dropped
    std::vector<int32_t> kept_;         ///< of the latest choice: indices into the previous alive_
    std::vector<int32_t> left_;         ///< dropped by the latest choice, likewise
    std::vector<int32_t> gone_now_;     ///< these as tokens of the ubatch
    std::vector<int32_t> layer_of_token_, layer_of_early_;
    std::map<int, std::vector<float>> seen_importance_;
};

}  // namespace agq
