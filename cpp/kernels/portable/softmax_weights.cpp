// The softmax weights, for all instruction sets.
#include "kernels/isa.h"
#include "kernels/portable/score_rows.h"

namespace agq {
namespace {

/// Turns a row of scores into weights; the first `n` scores are computed.
inline void normalize(float *row, int64_t n, int64_t padded, float maximum, const float *sink) {
    vec total{};
    for (int64_t j = 0; j < n; j += AGQ_VECTOR) {
        const vec p = exponential(load(row + j) - maximum);
        store(row + j, p);
        total += p;
    }
    float sum = sink ? std::exp(*sink - maximum) : 0.0f;
    for (int i = 0; i < AGQ_VECTOR; ++i) sum += total[i];
    const vec inverse = splat(sum > 0 ? 1.0f / sum : 0.0f);
    for (int64_t j = 0; j < n; j += AGQ_VECTOR) store(row + j, load(row + j) * inverse);
    if (n < padded) std::memset(row + n, 0, sizeof(float) * static_cast<size_t>(padded - n));
}

}  // namespace

namespace isa::AGQ_ISA {

void softmax_weights(const softmax_weights_args &args) {
    const int64_t padded = (args.n_keys + attention_keys - 1) / attention_keys * attention_keys;
    const int rows = args.n_tokens * args.group;
    float maximum[weights_row_limit], masks[weights_row_limit * attention_keys];
    int64_t seen[weights_row_limit] = {};  // keys up to the end of the last block in which a token sees a key
    for (int r = 0; r < rows; ++r) maximum[r] = args.sinks ? args.sinks[r % args.group] : -INFINITY;
    for (int64_t first = 0; first < args.n_keys; first += attention_keys) {
        const auto [begin, end] = read_masks(args, first, masks);
        // Tokens outside the range may still see later keys.
        for (int t = 0; t < args.n_tokens; ++t) {
            if (t >= begin && t < end) {
                seen[t] = first + attention_keys;
                continue;
            }
            for (int r = t * args.group; r < (t + 1) * args.group; ++r) {
                for (int j = 0; j < attention_keys; j += AGQ_VECTOR)
                    store(args.weights + r * args.stride + first + j, splat(-INFINITY));
            }
        }
        if (begin >= end) continue;
        const int64_t from = static_cast<int64_t>(begin) * args.group, to = static_cast<int64_t>(end) * args.group;
        multiply<false>(args.q + from * args.head, args.head,
                        args.keys + first / attention_keys * args.head * attention_keys, attention_keys,
                        args.weights + from * args.stride + first, args.stride, to - from, args.head, attention_keys);
        for (int64_t r = from; r < to; ++r) {
            maximum[r] = finish_scores(args.weights + r * args.stride + first, masks + r / args.group * attention_keys,
                                       args.slopes[r % args.group], args.soft_cap, maximum[r]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        const int64_t n = maximum[r] == -INFINITY ? 0 : seen[r / args.group];
        normalize(args.weights + r * args.stride, n, padded, maximum[r],
                  args.sinks ? args.sinks + r % args.group : nullptr);
    }
}

}  // namespace isa::AGQ_ISA
}  // namespace agq
