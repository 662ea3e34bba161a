// Tests the store of waiting tokens when it is full: what leaves, and what must not.
#include "prune/token_store.h"

#include <cstdio>

namespace {

using agq::token_block;
using agq::token_store;

int failures = 0;

void check(bool good, const char *what) {
    if (!good) std::printf("failed: %s\n", what);
    failures += !good;
}

constexpr size_t tokens = 64, row_bytes = token_store::most_bytes / 4 / tokens;  // four blocks fill the store

/// A block that was made, or null if there is no room.
std::shared_ptr<token_block> make(token_store *store, const token_block *needed, size_t others = 0,
                                  size_t windows = 0) {
    return store->make_block(tokens, row_bytes, windows, others,
                             [needed](const token_block &block) { return &block == needed; });
}

/// Puts a block into the store; its tokens have the numbers from `first` on.
void put(token_store *store, const std::shared_ptr<token_block> &block, uint64_t first) {
    std::vector<int32_t> positions;
    block->fingerprints.resize(1);
    block->cells.resize(1);
    for (size_t i = 0; i < tokens; ++i) {
        block->fingerprints[0].push_back(first + i);
        block->cells[0].push_back(static_cast<int32_t>(i));
        positions.push_back(static_cast<int32_t>(i));
    }
    store->put(block, positions, {});
}

/// The oldest tokens leave, whether or not a token was looked for before.
void test_most_tokens(bool is_searched) {
    token_store store;
    constexpr uint64_t blocks = token_store::most_tokens / tokens + 3;
    for (uint64_t i = 0; i < blocks; ++i) {
        put(&store, std::make_shared<token_block>(), i * tokens);
        if (is_searched && i % 1000 == 7) check(store.find(0, i * tokens), "a token that was just put is found");
    }
    check(store.blocks().size() == blocks - 3, "three blocks have left");
    check(!store.find(0, 0) && !store.find(0, 3 * tokens - 1), "their tokens are forgotten");
    check(store.find(0, 3 * tokens) && store.find(0, blocks * tokens - 1), "all others are known");
}

}  // namespace

int main() {
    token_store store;
    std::vector<std::shared_ptr<token_block>> blocks;
    for (uint64_t i = 0; i < 4; ++i) {
        blocks.push_back(make(&store, nullptr));
        check(blocks.back() != nullptr, "four blocks fit");
        if (!blocks.back()) return 1;
        put(&store, blocks.back(), 1000 * i);
    }
    const auto has_rows = [&](uint64_t number) {
        const agq::stored_token *token = store.find(0, number);
        return token && token->rows();
    };
    check(has_rows(0) && has_rows(3063), "all four blocks are there");

    check(!make(&store, blocks[0].get()), "the oldest block waits, so there is no room");
    check(has_rows(0) && has_rows(1000), "a refusal drops nothing");
    check(!make(&store, blocks[1].get(), row_bytes * tokens), "the block after the oldest one waits, too");
    check(has_rows(0) && has_rows(1000), "a refusal drops nothing");
    check(!make(&store, nullptr, token_store::most_bytes), "what was made before takes all");

    const char *memory = blocks[0]->rows.get();
    const std::shared_ptr<token_block> fifth = make(&store, blocks[1].get());
    check(fifth != nullptr, "the oldest block makes room");
    check(fifth && fifth->rows.get() == memory, "its memory is used again");
    check(!has_rows(0) && has_rows(1000), "only its rows leave");
    check(store.find(0, 0) && store.find(0, 0)->position == 0, "its tokens are still known");
    check(!make(&store, nullptr, 0, token_store::most_bytes), "keys and values of windows count, too");
    if (fifth) put(&store, fifth, 4000);
    check(has_rows(4000) && store.find(0, 4063)->position == 63, "the new block is there");
    check(!store.make_block(tokens, token_store::most_bytes, 0, 0, [](const token_block &) { return false; }),
          "a block that is larger than the store");

    test_most_tokens(false);
    test_most_tokens(true);
    if (failures == 0) std::printf("ok\n");
    return failures != 0;
}
