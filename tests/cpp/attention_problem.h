// Random problems for attention kernels, their expected results in double precision, and functions to run kernels on
// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/attention.h"

namespace {

constexpr float guard = 12345.0f;  // marks memory that a kernel must not write

struct problem {
    int tokens, group, head_qk, head_v;
    int64_t n_keys;
    bool has_mask, mask_is_f16, has_sinks;
    float soft_cap;
    std::vector<float> q, k, v, mask, slopes, sinks;  // k [key][channel], v [key][channel], mask [token][key]
};

/// Bytes aligned to a cache line, followed by a line that must not be written.
class aligned_bytes {
  public:
    explicit aligned_bytes(size_t size) : size_(size), memory_(size + 128, 0x5A) {}
    char *data() {
        const size_t address = reinterpret_cast<size_t>(memory_.data());
        return memory_.data() + (64 - address % 64) % 64;
    }
    bool guarded() {
        return std::all_of(data() + size_, data() + size_ + 64, [](char c) { return c == 0x5A; });
    }

  private:
    size_t size_;
    std::vector<char> memory_;
};

inline float to_half_and_back(float x) {
    if (std::isinf(x)) return x;
    int exponent;
    const float m = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(m, 11)), exponent - 11);
}

inline uint16_t half_bits(float x) {
    if (std::isinf(x)) return 0xFC00;
    if (x == 0) return 0;
    int exponent;
    const float m = std::frexp(std::fabs(x), &exponent);  // m in [0.5, 1): all values used here are normal in binary16
    const int mantissa = static_cast<int>(std::ldexp(m, 11)) & 1023;
    return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | mantissa);
}

inline std::vector<uint16_t> half_bits(const std::vector<float> &values) {
    std::vector<uint16_t> bits;
    bits.reserve(values.size());
    for (float x : values) bits.push_back(half_bits(x));
    return bits;
}

inline problem random_problem(std::mt19937 &rng) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    std::normal_distribution<float> normal;
    problem p;
    p.group = pick(1, 9);
    p.tokens = pick(1, std::min(40, agq::attention_row_limit / p.group));
    p.head_qk = pick(1, 20) * (pick(0, 1) ? 16 : 7);
    p.head_v = 16 * pick(1, 9);
    p.n_keys = pick(1, 300);
    p.has_mask = pick(0, 3) > 0;
    p.mask_is_f16 = pick(0, 1);
    p.has_sinks = pick(0, 3) == 0;
    p.soft_cap = pick(0, 3) == 0 ? 20.0f : 0.0f;
    const bool alibi = p.has_mask && pick(0, 1);
    const auto fill = [&](std::vector<float> &to, size_t n, float size) {
        to.resize(n);
        for (float &x : to) x = normal(rng) * size;
    };
    const size_t rows = static_cast<size_t>(p.tokens) * p.group, keys = static_cast<size_t>(p.n_keys);
    fill(p.q, rows * static_cast<size_t>(p.head_qk),
         (pick(0, 4) == 0 ? 8.0f : 1.0f) / std::sqrt(static_cast<float>(p.head_qk)));
    fill(p.k, keys * static_cast<size_t>(p.head_qk), 1);
    fill(p.v, keys * static_cast<size_t>(p.head_v), 1);
    fill(p.sinks, static_cast<size_t>(p.group), 2);
    for (int g = 0; g < p.group; ++g) p.slopes.push_back(alibi ? std::exp2(-static_cast<float>(g + 1)) : 1.0f);
    p.mask.assign(static_cast<size_t>(p.tokens) * keys, 0);
    const int shift = pick(-30, 250), style = pick(0, 2);
    for (int t = 0; t < p.tokens; ++t) {
        for (int64_t j = 0; j < p.n_keys; ++j) {
            const bool hidden = style == 0 ? j > t + shift : style == 1 ? pick(0, 2) == 0 : (t % 5 == 3);
            const float bias = alibi ? to_half_and_back(-std::fabs(static_cast<float>(t + shift - j))) : 0.0f;
            p.mask[static_cast<size_t>(t) * keys + static_cast<size_t>(j)] = hidden ? -INFINITY : bias;
        }
    }
    return p;
}

/// Scores of one row by the definition; -inf where the key is hidden.
inline std::vector<double> expected_scores(const problem &p, int t, int g) {
    const size_t keys = static_cast<size_t>(p.n_keys), row = static_cast<size_t>(t) * p.group + g;
    const size_t width = static_cast<size_t>(p.head_qk);
    std::vector<double> score(keys);
    for (size_t j = 0; j < keys; ++j) {
        double s = 0;
        for (size_t d = 0; d < width; ++d) s += static_cast<double>(p.q[row * width + d]) * p.k[j * width + d];
        if (p.soft_cap != 0) s = p.soft_cap * std::tanh(s / p.soft_cap);
        if (p.has_mask)
            s += static_cast<double>(p.slopes[static_cast<size_t>(g)]) * p.mask[static_cast<size_t>(t) * keys + j];
        score[j] = s;
    }
    return score;
}

/// Turns scores into softmax weights. If all keys are hidden and there is no sink, all weights are 0.
inline std::vector<double> expected_softmax(const problem &p, int g, std::vector<double> scores) {
    double top = p.has_sinks ? p.sinks[static_cast<size_t>(g)] : -HUGE_VAL;
    for (double s : scores) top = std::max(top, s);
    if (top == -HUGE_VAL) return std::vector<double>(scores.size(), 0.0);
    double sum = p.has_sinks ? std::exp(p.sinks[static_cast<size_t>(g)] - top) : 0.0;
    for (double &s : scores) sum += s = std::exp(s - top);
    for (double &s : scores) s /= sum;
    return scores;
}

/// Output of one row by the definition.
inline std::vector<double> expected(const problem &p, int t, int g) {
    const std::vector<double> weights = expected_softmax(p, g, expected_scores(p, t, g));
    const size_t head_v = static_cast<size_t>(p.head_v);
    std::vector<double> out(head_v, 0.0);
    for (size_t j = 0; j < weights.size(); ++j) {
        for (size_t d = 0; d < head_v; ++d) out[d] += weights[j] * p.v[j * head_v + d];
    }
    return out;
}

/// Sets the arguments that all kernels share: mask, slopes and soft cap. `half` is the mask in binary16.
template <typename Args>
void set_bias(const problem &p, const std::vector<uint16_t> &half, Args *args) {
    if (p.has_mask) {
        args->mask =
            p.mask_is_f16 ? reinterpret_cast<const char *>(half.data()) : reinterpret_cast<const char *>(p.mask.data());
        args->mask_stride = static_cast<size_t>(p.n_keys) * (p.mask_is_f16 ? 2 : 4);
        args->mask_is_f16 = p.mask_is_f16;
    }
    args->slopes = p.slopes.data();
    args->soft_cap = p.soft_cap;
}

/// Output [token][head of the group][head_v] of a kernel; empty if the kernel wrote outside its output.
inline std::vector<float> run(const agq::attention_kernel &kern, const problem &p) {
    const size_t width = static_cast<size_t>(p.head_qk), head_v = static_cast<size_t>(p.head_v);
    const size_t blocks = (static_cast<size_t>(p.n_keys) + agq::attention_keys - 1) / agq::attention_keys;
    const size_t key_bytes = kern.key_bytes(p.head_qk), value_bytes = kern.value_bytes(p.head_v);
    aligned_bytes keys(blocks * key_bytes), values(blocks * value_bytes);
    for (size_t b = 0; b < blocks; ++b) {
        const size_t first = b * agq::attention_keys;
        const int n = static_cast<int>(std::min<size_t>(agq::attention_keys, static_cast<size_t>(p.n_keys) - first));
        kern.pack_keys(&p.k[first * width], n, p.head_qk, keys.data() + b * key_bytes);
        kern.pack_values(&p.v[first * head_v], n, p.head_v, values.data() + b * value_bytes);
    }
    const std::vector<uint16_t> half = half_bits(p.mask);
    aligned_bytes scratch(kern.scratch_bytes(p.head_qk, p.head_v));
    const size_t token_stride = static_cast<size_t>(p.group) * head_v + 3;
    std::vector<float> out(token_stride * static_cast<size_t>(p.tokens) + 16, guard);

    agq::attention_args args = {};
    args.n_tokens = p.tokens;
    args.group = p.group;
    args.head_qk = p.head_qk;
    args.head_v = p.head_v;
    args.q = p.q.data();
    args.n_keys = p.n_keys;
    args.keys = keys.data();
    args.values = values.data();
    set_bias(p, half, &args);
    args.sinks = p.has_sinks ? p.sinks.data() : nullptr;
    args.out = out.data();
    args.out_token_stride = static_cast<int64_t>(token_stride);
    args.out_head_stride = p.head_v;
    args.scratch = scratch.data();
    kern.attend(args);

    std::vector<float> result;
    for (size_t t = 0; t < static_cast<size_t>(p.tokens); ++t) {
        const auto row = out.begin() + static_cast<std::ptrdiff_t>(t * token_stride);
        result.insert(result.end(), row, row + static_cast<std::ptrdiff_t>(token_stride - 3));
        if (!std::all_of(row + static_cast<std::ptrdiff_t>(token_stride - 3),
                         row + static_cast<std::ptrdiff_t>(token_stride), [](float x) { return x == guard; }))
            return {};
    }
    const bool kept = std::all_of(out.end() - 16, out.end(), [](float x) { return x == guard; }) && scratch.guarded() &&
                      keys.guarded() && values.guarded();
    return kept ? result : std::vector<float>();
}

/// The same for a kernel for few rows; values are stored by key or, if `transposed`, by channel.
inline std::vector<float> run_few(const agq::few_kernel &kern, const problem &p, bool transposed) {
    const int64_t step = agq::few_width_step, width = (p.head_qk + step - 1) / step * step, head_v = p.head_v;
    const int64_t rows = p.tokens * p.group, block_keys = agq::attention_keys;
    const auto floats = [](int64_t n) { return aligned_bytes(static_cast<size_t>(n) * sizeof(float)); };
    aligned_bytes q = floats(rows * width), keys = floats(block_keys * width), values = floats(block_keys * head_v);
    aligned_bytes out = floats(rows * head_v), maximum = floats(rows), sum = floats(rows);
    aligned_bytes masks = floats(p.tokens * block_keys), scores = floats(rows * block_keys);
    const auto as_floats = [](aligned_bytes &bytes) { return reinterpret_cast<float *>(bytes.data()); };
    const auto copy = [](const float *from, int64_t n, int64_t filled, float *to) {
        std::fill(std::copy_n(from, n, to), to + filled, 0.0f);
    };
    for (int64_t r = 0; r < rows; ++r)
        copy(&p.q[static_cast<size_t>(r * p.head_qk)], p.head_qk, width, as_floats(q) + r * width);
    std::fill_n(as_floats(out), rows * head_v, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
        const size_t g = static_cast<size_t>(r % p.group);
        as_floats(maximum)[r] = p.has_sinks ? p.sinks[g] : -INFINITY;
        as_floats(sum)[r] = p.has_sinks ? 1.0f : 0.0f;
    }
    const std::vector<uint16_t> half = half_bits(p.mask);

    agq::few_args args = {};
    args.n_tokens = p.tokens;
    args.group = p.group;
    args.width = static_cast<int>(width);
    args.head_v = p.head_v;
    args.q = as_floats(q);
    args.n_keys = p.n_keys;
    set_bias(p, half, &args);
    args.out = as_floats(out);
    args.maximum = as_floats(maximum);
    args.sum = as_floats(sum);
    args.masks = as_floats(masks);
    args.scores = as_floats(scores);
    for (int64_t first = 0; first < p.n_keys; first += block_keys) {
        agq::few_block block = {};
        kern.read_masks(args, first, &block);
        if (block.begin >= block.end) continue;
        block.n = static_cast<int>(std::min(block_keys, p.n_keys - first));
        block.keys = as_floats(keys);
        block.values = as_floats(values);
        block.transposed = transposed;
        std::fill_n(as_floats(keys), block_keys * width, 0.0f);
        std::fill_n(as_floats(values), block_keys * head_v, transposed ? 0.0f : guard);
        for (int64_t i = 0; i < block.n; ++i) {
            copy(&p.k[static_cast<size_t>((first + i) * p.head_qk)], p.head_qk, width, as_floats(keys) + i * width);
            for (int64_t d = 0; d < head_v; ++d) {
                as_floats(values)[transposed ? d * block_keys + i : i * head_v + d] =
                    p.v[static_cast<size_t>((first + i) * head_v + d)];
            }
        }
        kern.attend(args, block);
    }
    for (aligned_bytes *part : {&q, &keys, &values, &out, &maximum, &sum, &masks, &scores}) {
        if (!part->guarded()) return {};
    }
    std::vector<float> result(as_floats(out), as_floats(out) + rows * head_v);
    for (size_t i = 0; i < result.size(); ++i) {
        const float total = as_floats(sum)[static_cast<int64_t>(i) / head_v];
        result[i] = total == 0 ? 0.0f : result[i] / total;
    }
    return result;
}

}  // namespace
