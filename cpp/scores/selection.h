// Chooses the tokens to drop from their importance.
#pragma once

#include <cstdint>
#include <vector>

namespace agq {

/// Which tokens to drop. `by_share`: the least important ones; `value` is their share of the remaining tokens.
/// Otherwise: those whose importance is below the threshold `value`.
struct drop_rule {
    bool by_share = false;
    float value = 0;
};

/// Indices (ascending) of the tokens to drop, among the remaining ones. Protected tokens and tokens with NaN importance
/// stay. By share: the count is the share of all remaining tokens, rounded; among equals, earlier tokens are dropped
/// first. By threshold: all tokens below it are dropped.
std::vector<int32_t> choose_dropped(const drop_rule &rule, const std::vector<float> &importance,
                                    const std::vector<uint8_t> &is_protected);

/// Gives each token the highest importance within `reach` places. NaN is ignored as a neighbour, and stays NaN.
std::vector<float> spread(const std::vector<float> &importance, int reach);

}  // namespace agq
