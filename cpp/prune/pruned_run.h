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
#include "prune/graph_copy.h"
#include "prune/hidden_cells.h"
#include "prune/prune_plan.h"
#include "scores/heads.h"
#include "scores/score.h"

namespace agq {

/// Computes a part of a graph. `choices` says which keys its attentions look at.
using segment_fn = std::function<ggml_status(ggml_tensor **nodes, int n, const key_choices &choices)>;

/// Reuses its memory from run to run.
class pruned_run {
  public:
    explicit pruned_run(const attention_kernel *kern) : kern_(kern) {}
    pruned_run(const pruned_run &) = delete;
    pruned_run &operator=(const pruned_run &) = delete;

    /// Runs the cuts of `plan`, which must have no obstacle, for the ubatch that read_ubatch has read. `mask_only`: all
    /// tokens stay in the graph, but dropped ones are hidden. `whole`: the groups of the host's masks. Throws
    /// std::bad_alloc.
    ggml_status run(const graph_facts &facts, const prune_plan &plan, const hidden_cells &hidden, bool mask_only,
                    const ubatch_facts &ubatch, const key_choices &whole, int n_threads, const segment_fn &compute);

    /// For each token of the ubatch, the layer after which it was dropped, or -1.
    const std::vector<int32_t> &layer_of_token() const { return layer_of_token_; }
    /// By pruning layer, the importance of each token of the ubatch: NaN if it was dropped before, infinity if
    /// protected.
    const std::map<int, std::vector<float>> &importance() const { return seen_importance_; }
    /// By head, the largest attention that each token of the ubatch got from the last ones; NaN if it was dropped
    /// before. Of the heads that the cuts look at.
    const std::map<attention_head, std::vector<float>> &head_weights() const { return head_weights_; }

  private:
    struct call;

    ggml_tensor *mask_of(const call &c, int site);
    ggml_tensor *make_mask(const call &c, int level);
    ggml_status run_segment(const call &c, size_t segment);
    score_meter &meter_of(const prune_cut &cut);
    void prepare_meter(const call &c, const prune_cut &cut);
    void prepare(const call &c, int site, score_source source, score_meter *meter);
    std::vector<float> measured(const call &c, const prune_cut &cut, const std::vector<uint8_t> &is_protected);
    void keep_head_weights(const call &c);
    void choose(const call &c, const prune_cut &cut);
    void apply_cut(const call &c, const prune_cut &cut);
    void add_clears(const call &c, const prune_cut &cut);

    const attention_kernel *kern_;
    tensor_arena arena_;
    graph_copy copy_;
    graph_copy states_;                       ///< for dropped tokens, for the next segment
    std::vector<ggml_tensor *> first_nodes_;  ///< nodes at the start of a segment, after the copies
    std::map<const score *, std::unique_ptr<score_meter>> meters_;
    std::map<int, head_probe> probes_;           ///< by site; their memory is kept
    std::vector<const head_site *> probed_now_;  ///< in this segment
    std::map<attention_head, std::vector<float>> head_weights_;
    cut_job job_;                             ///< of the next segment
    std::deque<std::vector<int32_t>> lists_;  ///< that job_ and choices_ point to
    key_choices choices_;                     ///< by the masks of this run
    std::vector<ggml_tensor *> nodes_;
    std::vector<ggml_tensor *> masks_;  ///< of this segment, by level; null: not made yet
    int64_t rows_ = 0;                  ///< tokens in the graph; with mask_only all
    std::vector<int32_t> alive_;        ///< tokens that are not dropped, ascending
    std::vector<int32_t> gone_cells_;   ///< cells of dropped tokens, in the order in which they were dropped
    std::vector<int32_t> kept_;         ///< of the latest choice: indices into the previous alive_
    std::vector<int32_t> left_;         ///< dropped by the latest choice, likewise
    std::vector<int32_t> gone_now_;     ///< their cells
    std::vector<int32_t> layer_of_token_;
    std::map<int, std::vector<float>> seen_importance_;
};

}  // namespace agq
