// Runs one ubatch with ever fewer tokens. Each segment of the graph ends after the attention of a pruning layer.
// Between segments, each part of the ubatch chooses its tokens, and the needed copies are made.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "nodes/attention.h"
#include "prune/cut_job.h"
#include "prune/graph_copy.h"
#include "prune/part_run.h"
#include "prune/run_nodes.h"

namespace agq {

/// Reuses its memory from run to run.
class pruned_run {
  public:
    explicit pruned_run(const attention_kernel *kern) : kern_(kern) {}
    pruned_run(const pruned_run &) = delete;
    pruned_run &operator=(const pruned_run &) = delete;

    /// Runs the cuts of the plan. Tokens of earlier ubatches are chosen and computed together with those of this one.
    /// Parts that wait run only up to the first cut; their records are stored, and their tokens are marked as deferred
    /// in all later layers. `whole`: the groups of the host's masks. Throws std::bad_alloc.
    ggml_status run(const run_input &in, const key_choices &whole, const segment_fn &compute);

    /// A part as it is after the run.
    const part_run &part(size_t index) const { return *parts_[index]; }

  private:
    void begin(const run_input &in);
    int64_t first_row(const run_input &in, const part_run &part) const;
    int64_t n_rows(const run_input &in, const part_run &part) const;
    void add_record(const run_input &in, cut_job *job);
    ggml_tensor *mask_of(const run_input &in, int site);
    ggml_tensor *make_mask(const run_input &in, int level, size_t cuts);
    std::vector<int32_t> hidden_at(const run_input &in, int level, size_t cuts) const;
    std::vector<int32_t> visible_cells(const run_input &in, int kind, const part_run &part,
                                       const std::vector<int32_t> &hidden) const;
    const key_group *group_of(const run_input &in, const ggml_tensor *mask, const part_run &part) const;
    score_source source_of(const run_input &in, int site, const part_run &part);
    void add_meters(const run_input &in, const prune_cut &cut);
    void add_probes(const run_input &in, const head_site &heads);
    ggml_status run_segment(const run_input &in, size_t segment, const segment_fn &compute);
    void choose(const prune_cut &cut, const run_input &in, bool is_first);
    void apply_cut(const run_input &in, const prune_cut &cut);
    void spread_last_states(const run_input &in) const;

    const attention_kernel *kern_;
    std::deque<part_run> all_parts_;  ///< perhaps more than the ubatch has, to keep their memory
    std::vector<part_run *> parts_;   ///< of the ubatch
    run_nodes to_;
    graph_copy copy_;
    graph_copy states_;                       ///< for dropped tokens, for the next segment
    std::vector<ggml_tensor *> first_nodes_;  ///< nodes at the start of a segment, after the copies
    cut_job job_;                             ///< of the next segment
    std::vector<char *> records_;             ///< where to store that of each token of the ubatch, or null
    key_choices choices_;                     ///< by the masks of this run
    std::map<std::pair<int, size_t>, ggml_tensor *> masks_;  ///< of this segment, by level and cuts before the cache
    int64_t rows_ = 0;                                       ///< tokens in the graph; with mask_only all
    std::vector<int32_t> alive_;                             ///< tokens that are not dropped, ascending
    std::vector<int32_t> gone_;      ///< dropped tokens that leave no keys, in the order in which they were dropped
    std::vector<size_t> gone_ends_;  ///< how many there were after so many cuts
    std::vector<int32_t> kept_;      ///< at the latest cut: indices into the previous alive_
    std::vector<int32_t> left_;      ///< dropped at the latest cut, likewise
    std::vector<int32_t> gone_now_;  ///< these as tokens of the ubatch
};

}  // namespace agq
