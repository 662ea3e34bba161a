// Prepares the scores of a block of 64 keys for a softmax, in binary32: masks, ALiBi and soft cap. Like vector_math.h,
// a .cpp file includes it once.
#include "kernels/portable/vector_math.h"
#include "kernels/softmax_weights.h"

namespace agq {
namespace {

/// Reads a token's mask, which begins at `row` (null: nothing is hidden), for the block of keys that begins at `first`,
/// as floats. Keys past the last are hidden. Returns whether any key is visible.
inline bool read_mask(const char *row, bool is_f16, int64_t first, int64_t n_keys, float *mask) {
    const int n = static_cast<int>(n_keys - first < attention_keys ? n_keys - first : attention_keys);
    if (!row) {
        std::memset(mask, 0, sizeof(float) * attention_keys);
    } else if (is_f16) {
        f16_to_f32(reinterpret_cast<const uint16_t *>(row) + first, mask, n);
    } else {
        std::memcpy(mask, reinterpret_cast<const float *>(row) + first, sizeof(float) * static_cast<size_t>(n));
    }
    for (int j = n; j < attention_keys; ++j) mask[j] = -INFINITY;
    ivec visible{};
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) visible |= load(mask + j) != splat(-INFINITY);
    bool any = false;
    for (int i = 0; i < AGQ_VECTOR; ++i) any = any || visible[i] != 0;
    return any;
}

/// The tokens that see one of a block's keys: from `begin` up to, but not including, `end`.
struct token_range {
    int begin, end;
};

/// Reads the masks of all tokens for a block. Tokens are ascending. With a causal mask the first ones see the fewest
/// keys, so tokens that see no key of the block can be skipped.
template <typename Args>
inline token_range read_masks(const Args &args, int64_t first, float *masks) {
    token_range seen = {args.n_tokens, 0};
    for (int t = 0; t < args.n_tokens; ++t) {
        const char *row = args.mask ? args.mask + static_cast<size_t>(t) * args.mask_stride : nullptr;
        if (!read_mask(row, args.mask_is_f16, first, args.n_keys, masks + t * attention_keys)) continue;
        seen.begin = t < seen.begin ? t : seen.begin;
        seen.end = t + 1;
    }
    return seen;
}

/// c * tanh(s / c), or s if c is 0.
inline vec capped(vec s, float soft_cap) {
    if (soft_cap == 0) return s;
    const vec y = s / soft_cap, magnitude = y < 0.0f ? -y : y;
    const vec e = exponential(magnitude * -2.0f);  // tanh |y| = (1 - e^-2|y|) / (1 + e^-2|y|)
    const vec t = (1.0f - e) / (1.0f + e) * soft_cap;
    return y < 0.0f ? -t : t;
}

/// Finishes a row's scores for the softmax. Returns the larger of their maximum and `maximum`.
inline float finish_scores(float *scores, const float *mask, float slope, float soft_cap, float maximum) {
    vec best = splat(maximum);
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) {
        const vec s = capped(load(scores + j), soft_cap) + load(mask + j) * slope;
        store(scores + j, s);
        best = s > best ? s : best;
    }
    return largest(best);
}

/// Turns a row of scores into weights relative to the new maximum. Returns the factor for the previous output.
inline float weigh(float *scores, const float *mask, float slope, float soft_cap, float *maximum, float *sum) {
    const float top = finish_scores(scores, mask, slope, soft_cap, *maximum);
    if (top == -INFINITY) {
        // All keys are hidden, or the scores are NaN, which the comparisons above ignore.
        for (int j = 0; j < attention_keys; ++j) {
            if (scores[j] != scores[j]) *sum = scores[j];  // NOLINT(misc-redundant-expression)
        }
        for (int j = 0; j < attention_keys; j += AGQ_VECTOR) store(scores + j, vec{});
        return 1;
    }
    vec weights{};
    for (int j = 0; j < attention_keys; j += AGQ_VECTOR) {
        const vec p = exponential(load(scores + j) - top);
        store(scores + j, p);
        weights += p;
    }
    const float scale = *maximum == -INFINITY ? 0.0f : std::exp(*maximum - top);
    *sum = *sum * scale + total(weights);
    *maximum = top;
    return scale;
}

}  // namespace
}  // namespace agq
