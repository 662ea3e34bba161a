// Chooses the tokens that go, from their importance.
#pragma once

#include <cstdint>
#include <vector>

namespace agq {

/// How many tokens go: by rank (`by_share`, this share of those that are still there) or by threshold (those whose
/// importance is below `value`).
struct drop_rule {
    bool by_share = false;
    float value = 0;
};

/// Indices (ascending) of the tokens to drop among those still there. Protected tokens and those whose importance is
/// not a number stay. By share: the least important ones, as many as the share of all of them, rounded; of equals the
/// earlier one goes. By threshold: all below it.
std::vector<int32_t> choose_dropped(const drop_rule &rule, const std::vector<float> &importance,
                                    const std::vector<uint8_t> &is_protected);

/// The importance of tokens when each counts as much as the most important one at most `reach` places away; what is not
/// a number counts for nobody and stays so.
std::vector<float> spread(const std::vector<float> &importance, int reach);

}  // namespace agq
