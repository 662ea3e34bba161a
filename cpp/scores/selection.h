// Chooses the tokens to drop from their importance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace agq {

/// Which tokens to drop. `by_share`: the least important ones; `value` is their share of the remaining tokens.
/// Otherwise: those whose importance is below the threshold `value`.
struct drop_rule {
    bool by_share = false;
    float value = 0;
};

/// The share of `n` tokens, rounded to whole tokens.
size_t count_of_share(float share, size_t n);

/// Indices (ascending) of the `count` least important tokens, or of all that may leave if there are fewer. Protected
/// tokens and tokens with NaN importance stay. Among equals, earlier tokens leave first.
std::vector<int32_t> choose_least(const std::vector<float> &importance, const std::vector<uint8_t> &is_protected,
                                  size_t count);

/// Indices (ascending) of the tokens whose importance is below the threshold, but not of protected ones.
std::vector<int32_t> choose_below(const std::vector<float> &importance, const std::vector<uint8_t> &is_protected,
                                  float threshold);

/// Gives each token the highest importance within `reach` places. NaN is ignored as a neighbour, and stays NaN.
std::vector<float> spread(const std::vector<float> &importance, int reach);

}  // namespace agq
