#include "prune/token_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace agq {

uint64_t token_fingerprint(const key_rows &keys, int64_t cell) {
    // Four lanes, so that a row is read as fast as memory gives it.
    constexpr uint64_t factors[4] = {0x9E3779B97F4A7C15u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u,
                                     0xD6E8FEB86659FD93u};
    uint64_t lanes[4] = {1, 2, 3, 4};
    const char *row = keys.row(cell, 0);
    size_t i = 0;
    for (; i + 32 <= keys.row_bytes; i += 32) {
        for (size_t lane = 0; lane < 4; ++lane) {
            uint64_t word;
            std::memcpy(&word, row + i + 8 * lane, sizeof(word));
            lanes[lane] = (lanes[lane] ^ word) * factors[lane];
            lanes[lane] ^= lanes[lane] >> 29;
        }
    }
    for (; i < keys.row_bytes; ++i) {
        lanes[0] = (lanes[0] ^ static_cast<unsigned char>(row[i])) * factors[0];
        lanes[0] ^= lanes[0] >> 29;
    }
    uint64_t all = keys.row_bytes;
    for (uint64_t lane : lanes) {
        all = (all ^ lane) * factors[1];
        all ^= all >> 32;
    }
    return all;
}

namespace {

/// How much memory to take for so many bytes of rows: up to an eighth more, so that a later prompt of similar length
/// can use it again. To get memory of this size from the system and give it back takes longer than all other planning.
size_t room_for(size_t bytes) {
    size_t step = 1;
    while (16 * step < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}
static_assert((token_store::most_bytes & (token_store::most_bytes - 1)) == 0, "what fits still fits when rounded up");

}  // namespace

std::shared_ptr<token_block> token_store::make_block(size_t n, size_t row_bytes, size_t window_bytes, size_t others,
                                                     const std::function<bool(const token_block &)> &is_needed) {
    if (n * row_bytes > most_bytes) return nullptr;
    const size_t room = room_for(n * row_bytes), wanted = room + window_bytes + others;
    if (wanted > most_bytes) return nullptr;
    size_t free = most_bytes - bytes_, oldest = 0;
    for (; free < wanted && oldest < blocks_.size(); ++oldest) {
        const token_block &block = *blocks_[oldest];
        if (!block.rows) continue;
        if (is_needed(block)) return nullptr;
        free += block.bytes();
    }
    if (free < wanted) return nullptr;
    auto fresh = std::make_shared<token_block>();
    for (size_t i = 0; i < oldest; ++i) {
        token_block &block = *blocks_[i];
        bytes_ -= block.bytes();
        if (!fresh->rows && block.room == room) fresh->rows = std::move(block.rows);
        block.forget_rows();
    }
    fresh->row_bytes = row_bytes;
    fresh->room = room;
    fresh->window_bytes = window_bytes;
    if (room > 0 && !fresh->rows) fresh->rows.reset(new char[room]);
    return fresh;
}

void token_store::forget_oldest() {
    const token_block &block = *blocks_.front();
    // As long as no token is looked for, there are no tables.
    for (size_t kind = 0; kind < std::min(tokens_.size(), block.fingerprints.size()); ++kind) {
        for (uint64_t fingerprint : block.fingerprints[kind]) {
            const stored_token *found = tokens_[kind].find(fingerprint);
            if (found && found->block.get() == &block) tokens_[kind].erase(fingerprint);
        }
    }
    bytes_ -= block.bytes();
    n_tokens_ -= block.n_tokens();
    if (!new_blocks_.empty() && new_blocks_.front().block == blocks_.front()) new_blocks_.pop_front();
    blocks_.pop_front();
}

void token_store::put(const std::shared_ptr<token_block> &block, std::vector<int32_t> positions,
                      std::vector<int32_t> ids) {
    blocks_.push_back(block);
    bytes_ += block->bytes();
    n_tokens_ += block->n_tokens();
    new_blocks_.push_back({block, std::move(positions), std::move(ids)});
    while (n_tokens_ > most_tokens && blocks_.size() > 1) forget_oldest();
}

void token_store::index() const {
    for (const new_block &added : new_blocks_) index(added);
    new_blocks_.clear();
}

void token_store::index(const new_block &added) const {
    const std::shared_ptr<token_block> &block = added.block;
    if (tokens_.size() < block->fingerprints.size()) tokens_.resize(block->fingerprints.size());
    for (size_t kind = 0; kind < block->fingerprints.size(); ++kind) {
        for (size_t i = 0; i < block->fingerprints[kind].size(); ++i) {
            stored_token &token = *tokens_[kind].add(block->fingerprints[kind][i]).first;
            // Another cell may hold the same token and need the rows.
            if (token.block && token.rows() && !block->rows) continue;
            stored_token fresh = {added.positions[i], added.ids.empty() ? -1 : added.ids[i], block, i};
            for (size_t k = 0; token.block && k < block->fingerprints.size(); ++k) {
                if (const auto kept = token.kept(k)) fresh.keep(k, kept);
            }
            token = std::move(fresh);
        }
    }
}

void token_store::rename(size_t kind, uint64_t old, uint64_t fingerprint, int32_t shift) {
    index();
    if (kind >= tokens_.size()) return;
    const stored_token *found = tokens_[kind].find(old);
    if (!found) return;
    stored_token renamed = *found;
    renamed.position += shift;
    renamed.block->fingerprints[kind][renamed.index] = fingerprint;
    *tokens_[kind].add(fingerprint).first = std::move(renamed);
}

void token_store::move(size_t kind, const stored_token &by, int32_t shift) {
    index();
    stored_token *found = tokens_[kind].find(by.block->fingerprints[kind][by.index]);
    if (found && found->block == by.block) found->position += shift;
}

}  // namespace agq
