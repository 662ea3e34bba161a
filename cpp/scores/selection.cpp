#include "scores/selection.h"

#include <algorithm>
#include <cmath>

namespace agq {

size_t count_of_share(float share, size_t n) {
    return static_cast<size_t>(std::floor(static_cast<double>(share) * static_cast<double>(n) + 0.5));
}

std::vector<int32_t> choose_least(const std::vector<float> &importance, const std::vector<uint8_t> &is_protected,
                                  size_t count) {
    std::vector<int32_t> candidates;
    for (size_t i = 0; i < importance.size(); ++i) {
        if (!is_protected[i] && !std::isnan(importance[i])) candidates.push_back(static_cast<int32_t>(i));
    }
    const auto less = [&](int32_t a, int32_t b) {
        const float x = importance[static_cast<size_t>(a)], y = importance[static_cast<size_t>(b)];
        return x != y ? x < y : a < b;
    };
    const auto middle = candidates.begin() + static_cast<std::ptrdiff_t>(std::min(count, candidates.size()));
    std::nth_element(candidates.begin(), middle, candidates.end(), less);
    candidates.erase(middle, candidates.end());
    std::sort(candidates.begin(), candidates.end());
    return candidates;
}

std::vector<int32_t> choose_below(const std::vector<float> &importance, const std::vector<uint8_t> &is_protected,
                                  float threshold) {
    std::vector<int32_t> found;
    for (size_t i = 0; i < importance.size(); ++i) {
        if (!is_protected[i] && importance[i] < threshold) found.push_back(static_cast<int32_t>(i));
    }
    return found;
}

std::vector<float> spread(const std::vector<float> &importance, int reach) {
    if (reach == 0) return importance;
    const auto larger = [](float a, float b) { return a < b ? b : a; };
    std::vector<float> values(importance), best(importance.size());
    for (float &value : values) value = std::isnan(value) ? -INFINITY : value;  // it is not spread
    best = values;
    const size_t n = values.size();
    for (size_t distance = 1; distance <= static_cast<size_t>(reach) && distance < n; ++distance) {
        for (size_t i = distance; i < n; ++i) best[i] = larger(best[i], values[i - distance]);
        for (size_t i = distance; i < n; ++i) best[i - distance] = larger(best[i - distance], values[i]);
    }
    for (size_t i = 0; i < n; ++i) best[i] = std::isnan(importance[i]) ? NAN : best[i];
    return best;
}

}  // namespace agq
