// What to prune: AGQ_PRUNE (docs/pruning.md, "Control") as a struct.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/attributes.h"
#include "scores/score.h"
#include "scores/selection.h"

namespace agq {

constexpr int max_keep = 255, max_reach = 15;  ///< limits of the file format

/// After the attention of `layer`, drop tokens by a rule.
struct prune_stage {
    int layer = 0;
    drop_rule rule;
    const score *measure = &score_received;
    int keep = 0;   ///< the last `keep` tokens of a ubatch stay
    int reach = 0;  ///< each token gets the highest importance within this many places
    /// Later layers still get keys and values of dropped tokens, computed from their last state.
    bool reuse = false;
    state_direction direction;  ///< of a learned score, from a list or the file
    head_choice heads;          ///< of the score `heads`, likewise
    /// What a later question brings back, if `rule` is a share: so many of the tokens in front of it, as a share.
    float revive = 0;
};

struct prune_settings {
    enum class source_kind : uint8_t { file, off, list };

    source_kind source = source_kind::file;
    bool given = false;               ///< set explicitly, not the default
    bool mask_only = false;           ///< hide dropped tokens but keep them in the graph, to compare with a pruned run
    std::vector<prune_stage> stages;  ///< of a list, by ascending layer
    int min_tokens = 64;              ///< shortest ubatch that is pruned
};

/// Parses a specification; an empty text means the default. On an error returns false and sets `*error` to a message.
bool parse_prune_settings(const std::string &text, prune_settings *settings, std::string *error);

}  // namespace agq
