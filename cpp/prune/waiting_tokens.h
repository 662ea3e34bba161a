// Tokens that were computed up to the first cut and wait there for a question: the store of what is known of them, and
// what becomes of them in each ubatch (docs/pruning-ubatches.md).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "graph/ubatch.h"
#include "prune/cell_rows.h"
#include "prune/deferred_cells.h"
#include "prune/early_graph.h"
#include "prune/early_tokens.h"
#include "prune/hidden_cells.h"
#include "prune/part_work.h"
#include "prune/planned_graph.h"
#include "prune/token_store.h"

namespace agq {

/// The parts of one ubatch, and what is done with them.
struct divided_ubatch {
    ubatch_facts facts;
    ubatch_work work;
};

class waiting_tokens {
  public:
    /// Both are of the pruner; `hidden` are the hidden cells of the latest graph.
    waiting_tokens(planned_graph *graph, hidden_cells *hidden) : planned_(graph), hidden_(hidden) {}
    waiting_tokens(const waiting_tokens &) = delete;
    waiting_tokens &operator=(const waiting_tokens &) = delete;

    bool is_empty() const { return store_.empty(); }
    /// Why no token of the latest graph can wait, or empty.
    const std::string &obstacle() const { return obstacle_; }

    /// Reads what the store needs to know of a ubatch, before the graph may use the memory of its inputs again. Returns
    /// whether its tokens can be stored. If it has several streams, nothing else can be done with them. Throws
    /// std::bad_alloc.
    bool read_own(const std::vector<std::vector<int32_t>> &own_cells);

    /// Whether the host's graph of several streams has tokens that might wait: the logits of none are wanted, and it is
    /// not the first token of its sequence, which all questions keep. Throws std::bad_alloc.
    bool may_begin_to_wait();

    /// Prepares the store for the records of a ubatch that will be divided. Throws std::bad_alloc.
    void begin(ubatch_work *work);
    /// Lets a part wait for its question. Returns the reason why it cannot, empty if it can. Throws std::bad_alloc.
    std::string defer(const ubatch_facts &ubatch, const ubatch_part &part, part_work *work);
    /// Makes room for a part that may be pruned. Throws std::bad_alloc.
    void reserve(const ubatch_part &part, part_work *work);
    /// Finds the candidates that the parts choose from: tokens that wait, and those that a question may bring back. A
    /// part that is too short with them becomes one that keeps its tokens. Call after all blocks are made. Throws
    /// std::bad_alloc.
    void find_candidates(divided_ubatch *ubatch);

    /// The cells of tokens that wait and are seen by a token that neither waits itself nor chooses among them. `ubatch`
    /// may be null, if it is computed as it is. Throws std::bad_alloc.
    std::vector<int32_t> find_open(const divided_ubatch *ubatch);
    /// Computes the tokens of these cells without a choice, and finds the cells that are still hidden. Throws
    /// std::bad_alloc.
    ggml_status compute(std::vector<int32_t> open, const segment_fn &segment);
    /// Drops candidates that cannot be computed after all.
    void check_candidates(divided_ubatch *ubatch) const;
    /// Warns if cells are still open.
    void warn_of_lost(const std::vector<int32_t> &open);
    /// Marks may have been changed by others: the next search reads all.
    void forget_marks() { deferred_.forget(); }

    /// Undoes what an aborted run may have done to tokens that waited. Throws std::bad_alloc.
    void defer_again(const early_tokens &tokens);
    /// Runs a graph without attention. If it turns keys, because positions have changed, the store follows. Throws
    /// std::bad_alloc.
    ggml_status run_shift(const std::function<ggml_status()> &compute);
    /// Stores the tokens of the ubatch, which have been computed. `ubatch`: if it was divided, else null. Throws
    /// std::bad_alloc.
    void store(const divided_ubatch *ubatch);

  private:
    enum class answer : uint8_t { unknown, no, yes };

    bool asks();
    int find_kind();
    std::string find_sites();
    early_tokens find_early(int64_t row, size_t row_bytes) const;
    std::string find_kept(const early_tokens &before, const ubatch_part &part, token_block *kept);
    template <typename Function>
    void for_kept_rows(const kept_window &window, const Function &each) const;
    std::vector<kept_window *> find_kept_as_they_are(size_t kind);
    void find_distances(const early_tokens &before, const ubatch_part &part, token_block *block) const;
    bool is_needed(const token_block &block) const;
    int64_t find_row(const std::vector<int32_t> &cells) const;
    std::shared_ptr<token_block> make_block(const ubatch_part &part, size_t window_bytes);
    bool prepare_graph(const early_tokens &tokens);
    void find_candidates_of(const divided_ubatch &ubatch, size_t index, part_work *work);
    void store_part(size_t first, size_t n, std::shared_ptr<token_block> block);
    const graph_facts &facts() const { return planned_->facts(); }

    planned_graph *planned_;
    hidden_cells *hidden_;
    token_store store_;
    deferred_cells deferred_;
    early_graph graph_;
    answer asks_ = answer::unknown;  ///< whether the cuts look at heads
    std::vector<int> layers_;        ///< the pruning layers
    int known_kind_ = -1;            ///< the kind of attention that has no window, once that is known
    bool has_told_size_ = false;
    bool has_warned_ = false;
    bool has_computed_ = false;  ///< whether tokens that waited were computed without a choice in this ubatch

    // Of this graph. Vectors are by kind of attention.
    waiting_sites sites_;
    std::vector<key_rows> keys_, next_keys_;  ///< at sites_.keys and sites_.next, from the stream's first cell on
    std::vector<const void *> roots_;         ///< the memory of the cache at sites_.keys
    std::vector<bool> turns_;                 ///< whether keys depend on positions
    std::vector<int64_t> n_cells_;            ///< of all streams
    std::vector<int64_t> first_of_stream_;    ///< number of the first cell of this ubatch's stream
    std::string obstacle_;                    ///< why no token can wait

    /// The layers of which keys and values are kept for windows, of the graph that kept them first.
    struct kept_layer {
        int site, kind;
        std::vector<cell_rows> rows;  ///< by stream
    };
    std::vector<kept_layer> kept_layers_;

    // The tokens of this ubatch.
    std::vector<std::vector<int32_t>> cells_;
    std::vector<int32_t> positions_, ids_;
    size_t row_bytes_ = 0, made_bytes_ = 0;  ///< of a record; of the blocks that were made
};

}  // namespace agq
