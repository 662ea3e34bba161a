// Remembers tokens that were computed up to the first pruning layer, so that a later question can choose among them.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "prune/zero_rows.h"

namespace agq {

/// A token's identity is its row of keys at the attention of the first pruning layer: it depends on the token, its
/// position and everything before. Cells may be moved, restored, shared and used again; what is no longer in the cache
/// is never found. So that layer must not be the model's first, whose keys do not depend on what is before.
uint64_t token_fingerprint(const key_rows &keys, int64_t cell);

/// Tokens that were computed together, and perhaps their rows of all tensors that cross the first cut.
struct token_block {
    std::unique_ptr<char[]> rows;  ///< [tokens][row_bytes]; null if there are none
    size_t row_bytes = 0;
    /// Of the last tokens, if they may observe the others for a question that is too short: their queries in the
    /// attentions up to the first cut whose heads are measured, [tokens][query_floats].
    std::vector<float> queries;
    size_t query_floats = 0;
    std::vector<uint64_t> fingerprints;
    std::vector<int32_t> cells;   ///< where the tokens were when they were computed
    int64_t first_of_stream = 0;  ///< number of the first cell of their stream
};

struct stored_token {
    int32_t position = 0, id = -1;  ///< in the sequence, and in the vocabulary (-1 if the host gave an embedding)
    std::shared_ptr<token_block> block;
    size_t index = 0;  ///< in the block

    /// The token's rows, or null.
    const char *rows() const { return block->rows ? block->rows.get() + index * block->row_bytes : nullptr; }
    /// Its queries, or null.
    const float *queries() const {
        const size_t n = block->query_floats ? block->queries.size() / block->query_floats : 0;
        const size_t first = block->fingerprints.size() - n;
        return index < first || n == 0 ? nullptr : &block->queries[(index - first) * block->query_floats];
    }
};

/// The tokens of one backend instance. The oldest leave first.
class token_store {
  public:
    static constexpr size_t most_bytes = size_t{256} << 20;  ///< of rows
    static constexpr size_t most_tokens = size_t{1} << 17;

    /// Makes room for rows of `n` tokens, which may drop rows of older tokens, but not of blocks for which `is_needed`
    /// returns true. `others`: the size of blocks that were made, but not yet put into the store. Returns null if there
    /// is no room. Throws std::bad_alloc.
    std::shared_ptr<token_block> make_block(size_t n, size_t row_bytes, size_t others,
                                            const std::function<bool(const token_block &)> &is_needed);
    /// Adds the tokens of a block, whose fingerprints and cells are set. Throws std::bad_alloc.
    void put(const std::shared_ptr<token_block> &block, const std::vector<int32_t> &positions,
             const std::vector<int32_t> &ids);
    const stored_token *find(uint64_t fingerprint) const {
        const auto found = tokens_.find(fingerprint);
        return found == tokens_.end() ? nullptr : &found->second;
    }
    /// The same token with another row of keys and another position, which may be in the cache beside the old one.
    /// Throws std::bad_alloc.
    void rename(uint64_t old, uint64_t fingerprint, int32_t shift);
    void forget(uint64_t fingerprint) { tokens_.erase(fingerprint); }
    bool has_rows() const { return bytes_ > 0; }
    bool empty() const { return tokens_.empty(); }

  private:
    void forget_oldest();

    std::unordered_map<uint64_t, stored_token> tokens_;
    std::deque<std::shared_ptr<token_block>> blocks_;  ///< oldest first
    size_t bytes_ = 0;
};

}  // namespace agq
