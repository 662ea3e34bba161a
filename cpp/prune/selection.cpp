#include "prune/selection.h"

#include <algorithm>
#include <cmath>

namespace agq {

std::vector<int32_t> choose_dropped(const prune_stage &stage, const std::vector<float> &importance,
                                    const std::vector<uint8_t> &is_protected) {
    std::vector<int32_t> candidates;
    for (size_t i = 0; i < importance.size(); ++i) {
        if (is_protected[i] || std::isnan(importance[i])) continue;
        if (stage.by_share || importance[i] < stage.value) candidates.push_back(static_cast<int32_t>(i));
    }
    if (!stage.by_share) return candidates;
    const double wanted = std::floor(static_cast<double>(stage.value) * static_cast<double>(importance.size()) + 0.5);
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
            own = std::fmax(own, importance[static_cast<size_t>(j)]);  // of a NaN and a number it takes the number
        }
    }
    return best;
}

float random_importance(int32_t position, int layer) {
    // The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    uint64_t z = (static_cast<uint64_t>(static_cast<uint32_t>(position)) << 32 | static_cast<uint32_t>(layer)) +
                 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<float>((z ^ z >> 31) >> 40) * 0x1p-24f;
}

}  // namespace agq
