// Chooses the tokens that go, from their importance.
#pragma once

#include <cstdint>
#include <vector>

#include "prune/settings.h"

namespace agq {

/// Indices (ascending) of the tokens to drop among those still there. Protected tokens and those whose importance is
/// not a number stay. By share: the least important ones, as many as the share of all of them, rounded; of equals the
/// earlier one goes. By threshold: all below it.
std::vector<int32_t> choose_dropped(const prune_stage &stage, const std::vector<float> &importance,
                                    const std::vector<uint8_t> &is_protected);

/// The importance of tokens when each counts as much as the most important one at most `reach` places away; what is not
/// a number counts for nobody and stays so.
std::vector<float> spread(const std::vector<float> &importance, int reach);

/// A number in [0, 1) for a position, the same in every run: the importance of `random`.
float random_importance(int32_t position, int layer);

}  // namespace agq
