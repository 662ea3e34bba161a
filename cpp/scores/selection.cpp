#include "scores/selection.h"

#include <algorithm>
#include <cmath>

namespace agq {

std::vector<int32_t> choose_dropped(const drop_rule &rule, const std::vector<float> &importance,
                                    const std::vector<uint8_t> &is_protected) {
    std::vector<int32_t> candidates;
    for (size_t i = 0; i < importance.size(); ++i) {
        if (is_protected[i] || std::isnan(importance[i])) continue;
        if (rule.by_share || importance[i] < rule.value) candidates.push_back(static_cast<int32_t>(i));
    }
    if (!rule.by_share) return candidates;
    const double wanted = std::floor(static_cast<double>(rule.value) * static_cast<double>(importance.size()) + 0.5);
    const size_t count = std::min(candidates.size(), static_cast<size_t>(wanted));
    const auto less = [&](int32_t a, int32_t b) {
        const float x = importance[static_cast<size_t>(a)], y = importance[static_cast<size_t>(b)];
        return x != y ? x < y : a < b;
    };
    const auto middle = candidates.begin() + static_cast<std::ptrdiff_t>(count);
    std::nth_element(candidates.begin(), middle, candidates.end(), less);
    candidates.erase(middle, candidates.end());
    std::sort(candidates.begin(), candidates.end());
    return candidates;
}

std::vector<float> spread(const std::vector<float> &importance, int reach) {
    if (reach == 0) return importance;
    const int64_t n = static_cast<int64_t>(importance.size());
    std::vector<float> best(importance);
    for (int64_t i = 0; i < n; ++i) {
        float &own = best[static_cast<size_t>(i)];
        if (std::isnan(own)) continue;
        const int64_t end = std::min<int64_t>(n, i + reach + 1);
        for (int64_t j = std::max<int64_t>(0, i - reach); j < end; ++j) {
            own = std::fmax(own, importance[static_cast<size_t>(j)]);  // if one is NaN, fmax returns the other
        }
    }
    return best;
}

}  // namespace agq
