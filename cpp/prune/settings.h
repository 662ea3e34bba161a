// What to prune: the text of AGQ_PRUNE (docs/pruning.md, "Control") as a struct.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "scores/score.h"
#include "scores/selection.h"

namespace agq {

constexpr int max_keep = 255, max_reach = 15;  ///< as the file format has room for

/// Behind the attention of `layer`, drop tokens by a rule.
struct prune_stage {
    int layer = 0;
    drop_rule rule;
    const score *measure = &score_received;
    int keep = 0;   ///< the last so many tokens of an ubatch stay
    int reach = 0;  ///< each token gets the highest importance within so many places
    /// Later layers still get keys and values of dropped tokens, from the state in which they left.
    bool reuse = false;
    state_direction direction;  ///< of a learned score: from the file
};

struct prune_settings {
    enum class source_kind : uint8_t { file, off, list };

    source_kind source = source_kind::file;
    bool given = false;      ///< set by somebody, and not the default
    bool mask_only = false;  ///< tokens stay in the graph, their keys are hidden: what a pruned run is compared with
    std::vector<prune_stage> stages;  ///< of a list, by ascending layer
    int min_tokens = 64;              ///< shortest ubatch to prune
};

/// Reads a specification; an empty text means the default. On a mistake returns false and `*error` says which.
bool parse_prune_settings(const std::string &text, prune_settings *settings, std::string *error);

}  // namespace agq
