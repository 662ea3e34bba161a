// What to do with the parts of a ubatch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "prune/early_graph.h"
#include "prune/early_tokens.h"
#include "prune/token_records.h"
#include "prune/token_store.h"

namespace agq {

struct part_work {
    enum class kind : uint8_t {
        keep,   ///< all its tokens run through all layers
        prune,  ///< tokens are dropped
        defer   ///< its tokens run up to the first cut and wait there for a question
    };
    kind what = kind::keep;
    early_tokens tokens;                 ///< if pruned: those that are missing are candidates
    bool keeps_own = false;              ///< only candidates are dropped, because the part is short
    std::shared_ptr<token_block> block;  ///< where to store its tokens; null: without their rows

    bool has_candidates() const { return !tokens.missing.empty(); }
};

struct ubatch_work {
    std::vector<part_work> parts;  ///< as in the ubatch; empty if all are kept
    early_graph *graph = nullptr;  ///< computes candidates
    token_record record;           ///< of a token that is stored, at the first cut
    std::vector<char> mark;        ///< of deferred tokens
};

}  // namespace agq
