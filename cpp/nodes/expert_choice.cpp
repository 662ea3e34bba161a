#include "nodes/expert_choice.h"

#include <algorithm>
#include <limits>

#include "host/tensor_rows.h"

namespace agq {

namespace {

/// Row `token` of a tensor whose rows are numbers of one token.
float *floats(const ggml_tensor *t, int64_t token) {
    return reinterpret_cast<float *>(row_address(t, token, 0, 0));
}

/// The numbers of the `count` highest scores, highest first; of equal scores, the one with the lower number comes
/// first. NaN counts as the lowest score.
void find_highest(const float *scores, int64_t n, int count, int32_t *found) {
    constexpr float lowest = -std::numeric_limits<float>::infinity();
    float best[expert_choice::most];
    int filled = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float score = scores[i] >= lowest ? scores[i] : lowest;
        if (filled == count && score <= best[count - 1]) continue;
        int at = filled < count ? filled++ : count - 1;
        for (; at > 0 && best[at - 1] < score; --at) {
            best[at] = best[at - 1];
            found[at] = found[at - 1];
        }
        best[at] = score;
        found[at] = static_cast<int32_t>(i);
    }
}

/// Writes the chosen numbers, then all others of 0..n-1.
void write_order(const int32_t *chosen, int count, int64_t n, int32_t *to) {
    to = std::copy_n(chosen, count, to);
    int32_t ascending[expert_choice::most];
    const int32_t *next = ascending, *end = std::copy_n(chosen, count, ascending);
    std::sort(ascending, ascending + count);
    for (int32_t i = 0; i < n; ++i) {
        if (next != end && *next == i) {
            ++next;
        } else {
            *to++ = i;
        }
    }
}

}  // namespace

void expert_choice_node(ggml_tensor *, int, int, void *userdata) {
    expert_choice &c = *static_cast<expert_choice *>(userdata);
    const int64_t n = c.scores->ne[0], tokens = c.scores->ne[1];
    const int count = static_cast<int>(c.ids->ne[0]);
    int32_t found[expert_choice::most];
    for (int64_t t; (t = c.next.fetch_add(1, std::memory_order_relaxed)) < tokens;) {
        find_highest(floats(c.scores, t), n, count, found);
        write_order(found, count, n, reinterpret_cast<int32_t *>(row_address(c.sorted, t, 0, 0)));
        float weights[expert_choice::most];
        for (int i = 0; i < count; ++i) weights[i] = *reinterpret_cast<float *>(row_address(c.values, found[i], t, 0));
        for (int i = 0; i < count; ++i) *reinterpret_cast<float *>(row_address(c.weights, i, t, 0)) = weights[i];
        if (!c.shares) continue;
        // The host adds in binary64, too.
        double sum = 0;
        for (int i = 0; i < count; ++i) sum += static_cast<double>(weights[i]);
        const float rounded = static_cast<float>(sum);
        const float clamped = std::max(std::min(rounded, c.greatest), c.least);
        *floats(c.sum, t) = rounded;
        *floats(c.clamped, t) = clamped;
        for (int i = 0; i < count; ++i) floats(c.shares, t)[i] = weights[i] / clamped;
    }
}

}  // namespace agq
