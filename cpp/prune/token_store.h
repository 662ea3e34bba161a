// Remembers tokens that were computed up to the first pruning layer, so that a later question can choose among them.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "base/flat_map.h"
#include "prune/zero_rows.h"

namespace agq {

/// A token's identity is its row of keys at the last attention of a kind up to the first pruning layer: it depends on
/// the token, its position and everything before. Cells may be moved, restored, shared and used again; what is no
/// longer in the cache is never found. So that layer must not be the model's first, whose keys do not depend on what is
/// before.
uint64_t token_fingerprint(const key_rows &keys, int64_t cell);

/// Keys and values of a token in the layers behind the first cut that belong to one kind of attention. The cells of
/// windows may be used again while later tokens wait that need them.
struct kept_window {
    int kind = 0;
    int end_site = 0;              ///< index of the first attention of the kind in which the token is missing
    std::unique_ptr<char[]> rows;  ///< of attentions in front of it, one behind another
    int64_t stream = 0, cell = 0;  ///< where they came from
    bool may_move = true;          ///< unless the keys of another kind have shown that the token keeps its position
};

/// Tokens that were computed together, and perhaps their rows of all tensors that cross the first cut. Vectors of
/// vectors are by kind of attention, and then by token.
struct token_block {
    std::unique_ptr<char[]> rows;  ///< [tokens][row_bytes]; null if there are none
    size_t row_bytes = 0;
    size_t room = 0;  ///< the size of the memory at `rows`: a little more than they need, or 0
    /// Of the last tokens, if they may observe the others for a question that is too short: their queries in the
    /// attentions up to the first cut whose heads are measured, [tokens][query_floats].
    std::vector<float> queries;
    size_t query_floats = 0;
    std::vector<std::vector<uint64_t>> fingerprints;
    std::vector<std::vector<int32_t>> cells;     ///< where the tokens were when they were computed
    std::vector<int64_t> first_of_stream;        ///< by kind: number of the first cell of their stream
    std::vector<std::vector<int32_t>> distance;  ///< how far in front of itself a token sees others; empty: not known
    /// What a window needs of tokens that were computed before these began to wait.
    std::vector<std::shared_ptr<kept_window>> windows;
    size_t window_bytes = 0;
    std::vector<std::vector<std::weak_ptr<kept_window>>> kept;  ///< of these tokens, by other blocks; may be empty

    size_t n_tokens() const { return fingerprints.empty() ? 0 : fingerprints[0].size(); }
    size_t bytes() const { return rows ? room + window_bytes : 0; }
    void forget_rows() {
        rows.reset();
        room = 0;
        windows.clear();
    }
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
        const size_t first = block->n_tokens() - n;
        return index < first || n == 0 ? nullptr : &block->queries[(index - first) * block->query_floats];
    }
    /// How far in front of itself it sees others in a kind of attention, or -1.
    int32_t distance(size_t kind) const { return block->distance.empty() ? -1 : block->distance[kind][index]; }
    /// What was kept of it for windows of a kind, or null.
    std::shared_ptr<kept_window> kept(size_t kind) const {
        const bool is_there = !block->kept.empty() && !block->kept[kind].empty();
        return is_there ? block->kept[kind][index].lock() : nullptr;
    }
    /// Keeps that.
    void keep(size_t kind, const std::shared_ptr<kept_window> &window) const {
        if (block->kept.empty()) block->kept.resize(block->fingerprints.size());
        block->kept[kind].resize(block->n_tokens());
        block->kept[kind][index] = window;
    }
};

/// The tokens of one backend instance. The oldest leave first.
class token_store {
  public:
    static constexpr size_t most_bytes = size_t{256} << 20;  ///< of rows
    static constexpr size_t most_tokens = size_t{1} << 17;   ///< as often as they were computed

    /// Makes room for rows of `n` tokens and for `window_bytes`, which may drop rows of older tokens, but not of blocks
    /// for which `is_needed` returns true. `others`: the size of blocks that were made, but not yet put into the store.
    /// Returns null if there is no room. Throws std::bad_alloc.
    std::shared_ptr<token_block> make_block(size_t n, size_t row_bytes, size_t window_bytes, size_t others,
                                            const std::function<bool(const token_block &)> &is_needed);
    /// Adds the tokens of a block, whose fingerprints and cells are set. Throws std::bad_alloc.
    void put(const std::shared_ptr<token_block> &block, std::vector<int32_t> positions, std::vector<int32_t> ids);
    /// The token with this fingerprint in a kind of attention, or null.
    const stored_token *find(size_t kind, uint64_t fingerprint) const {
        index();
        if (kind >= tokens_.size()) return nullptr;
        return tokens_[kind].find(fingerprint);
    }
    /// The same token with another row of keys and another position, which may be in the cache beside the old one.
    /// Throws std::bad_alloc.
    void rename(size_t kind, uint64_t old, uint64_t fingerprint, int32_t shift);
    /// Moves the token to another position in a kind of attention whose keys do not depend on it. `by`: it in another
    /// kind.
    void move(size_t kind, const stored_token &by, int32_t shift);
    void forget(size_t kind, uint64_t fingerprint) {
        index();
        if (kind < tokens_.size()) tokens_[kind].erase(fingerprint);
    }
    bool has_rows() const { return bytes_ > 0; }
    bool empty() const { return blocks_.empty(); }
    /// Oldest first.
    const std::deque<std::shared_ptr<token_block>> &blocks() const { return blocks_; }

  private:
    /// A block that was put into the store.
    struct new_block {
        std::shared_ptr<token_block> block;
        std::vector<int32_t> positions, ids;  ///< ids may be empty
    };

    void index() const;
    void index(const new_block &added) const;
    void forget_oldest();

    /// By kind of attention. Tokens of new blocks come in when the first one is looked for: most never are.
    mutable std::vector<flat_map<uint64_t, stored_token>> tokens_;
    mutable std::deque<new_block> new_blocks_;         ///< oldest first
    size_t n_tokens_ = 0;                              ///< of all blocks
    std::deque<std::shared_ptr<token_block>> blocks_;  ///< oldest first
    size_t bytes_ = 0;
};

}  // namespace agq
