// Computes tokens of earlier ubatches in the layers after the first cut, from their records. The nodes are copies of a
// graph that the host has computed before, with memory of their own, so they run before any graph of the host.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "nodes/attention.h"
#include "prune/cut_job.h"
#include "prune/early_tokens.h"
#include "prune/graph_copy.h"
#include "prune/hidden_cells.h"
#include "prune/prune_plan.h"
#include "prune/side_cache.h"
#include "prune/token_records.h"
#include "scores/heads.h"

namespace agq {

/// Computes a part of a graph. `choices` says which keys its attentions look at.
using segment_fn = std::function<ggml_status(ggml_tensor **nodes, int n, const key_choices &choices)>;

/// Tokens on their way through the layers.
class early_pass {
  public:
    /// Begins with `tokens`, which must outlive the pass.
    void begin(const early_tokens &tokens);
    /// The tokens that an attention of this kind sees if `alive` are computed, by their places, ascending. In a window,
    /// each token sees only some of them. Throws std::bad_alloc.
    std::vector<int32_t> order_of(const hidden_cells &hidden, int kind, int site,
                                  const std::vector<int32_t> &alive) const;
    /// The queries that the token before the last `back` of those run has at an attention of the latest segment,
    /// [heads][head]; null if they were not kept.
    const float *queries(int site, size_t back) const;

  private:
    friend class early_graph;

    const early_tokens *tokens_ = nullptr;
    std::vector<char *> at_cut_;  ///< by missing token: its record at the latest cut
    std::deque<std::unique_ptr<char[]>> pools_;
    std::map<int, std::vector<float>> queries_;  ///< of the last tokens in the latest segment, by site
    size_t n_queries_ = 0;
};

class early_graph {
  public:
    /// Copies the graph, which `plan` must be able to cut. Returns the reason if it cannot be used, empty if it can.
    /// Throws std::bad_alloc.
    std::string capture(const graph_facts &facts, const prune_plan &plan, const waiting_sites &sites);
    /// Whether a graph is captured, and its weights and layers are those of `now`. Tensors of a host may be gone.
    bool fits(const graph_facts &now) const;
    /// Whether the captured attentions reach all cells that these tokens see.
    bool reaches(const early_tokens &tokens) const;
    /// Whether they reach as many cells as those of another graph with these layers.
    bool reaches_all_of(const graph_facts &now) const;
    /// How many tokens the captured graph has.
    int64_t tokens() const { return plan_.tokens; }
    /// The size of a token's record at the first cut; 0 if no graph is captured.
    size_t record_bytes() const { return records_.empty() ? 0 : records_[0].bytes; }

    /// Computes what stands between the cut `segment - 1` and the next one (or the last layer's keys and values) for
    /// tokens.missing[alive] of a pass: their keys and values, and their records at the next cut. Tokens that are
    /// hidden and not among them stay hidden. `buffer`: any of the host's buffers for nodes. Throws std::bad_alloc.
    ggml_status run(size_t segment, early_pass *pass, const std::vector<int32_t> &alive, const hidden_cells &hidden,
                    ggml_backend_buffer *buffer, const segment_fn &compute);
    size_t segments() const { return needed_.size(); }

  private:
    /// A kind of attention with a window while a segment runs. Tokens are known by their number in `order`. Each takes
    /// the cell of the side cache that is its number modulo the room, so those that are seen together do not meet.
    struct side_window {
        bool is_used = false;              ///< whether the segment has attentions of the kind
        std::vector<int32_t> order;        ///< places of the tokens that the first of these attentions sees
        std::vector<int32_t> number;       ///< by place; -1: none
        std::vector<int32_t> loaded;       ///< by cell: the number of the token that is there, or -1
        std::vector<uint8_t> is_computed;  ///< by place: whether the segment computes the token
    };

    std::string find_needed(const graph_facts &facts);
    void begin_windows(size_t segment, const std::vector<int32_t> &alive, const hidden_cells &hidden);
    bool fits_windows(const std::vector<int32_t> &alive, size_t first, size_t end) const;
    void load_windows(size_t segment, const std::vector<int32_t> &chunk);
    void read_rows(int kind, size_t place, int site, char *record) const;
    void finish_windows(size_t segment, const std::vector<int32_t> &chunk);
    std::vector<int> sites_of(size_t segment, int kind) const;
    int32_t first_number(int kind, int32_t place) const;
    int32_t side_cell(int kind, int32_t place) const;
    ggml_status run_chunk(size_t segment, const std::vector<int32_t> &chunk, const std::vector<char *> &next,
                          ggml_backend_buffer *buffer, const segment_fn &compute);
    void add_inputs(size_t segment, const std::vector<int32_t> &chunk, cut_job *job);
    ggml_tensor *make_mask(const std::vector<int32_t> &chunk, int kind, const std::vector<int32_t> &order,
                           cut_job *job);

    std::deque<ggml_tensor> tensors_;  ///< the copies
    std::vector<ggml_tensor *> nodes_;
    std::vector<const ggml_tensor *> weights_;  ///< leaves that are not copied; compared, not read
    std::vector<const void *> weight_data_;
    std::unique_ptr<char[]> memory_, constants_;
    size_t memory_size_ = 0;
    graph_facts facts_;
    prune_plan plan_;
    side_cache side_;
    std::vector<token_record> records_;     ///< by cut
    std::vector<std::vector<int>> needed_;  ///< by segment; the first is empty

    early_pass *pass_ = nullptr;  ///< the one that runs
    tensor_arena arena_;
    graph_copy copy_;
    std::deque<std::vector<int32_t>> lists_;
    std::deque<std::vector<char *>> pointers_;
    key_choices choices_;
    std::vector<std::vector<int32_t>> orders_;  ///< of this segment, by site
    std::vector<side_window> windows_;          ///< of this segment, by kind
};

}  // namespace agq
