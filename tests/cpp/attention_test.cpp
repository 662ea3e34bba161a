// Every attention kernel this CPU can run against a plain softmax in double precision, over random shapes, masks and
// modes. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel.h"
#include "kernels/select.h"

namespace {

constexpr float guard = 12345.0f;  // stands where a kernel must not write

struct problem {
    int tokens, group, head_qk, head_v;
    int64_t n_keys;
    bool has_mask, mask_is_f16, has_sinks;
    float soft_cap;
    std::vector<float> q, k, v, mask, slopes, sinks;  // k [key][channel], v [key][channel], mask [token][key]
};

float to_half_and_back(float x) {
    if (std::isinf(x)) return x;
    int exponent;
    const float m = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(m, 11)), exponent - 11);
}

uint16_t half_bits(float x) {
    if (std::isinf(x)) return 0xFC00;
    if (x == 0) return 0;
    int exponent;
    const float m = std::frexp(std::fabs(x), &exponent);  // m in [0.5, 1): all values used here are normal in binary16
    const int mantissa = static_cast<int>(std::ldexp(m, 11)) & 1023;
    return static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | mantissa);
}

problem random_problem(std::mt19937 &rng) {
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
    const size_t rows = static_cast<size_t>(p.tokens * p.group), keys = static_cast<size_t>(p.n_keys);
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

/// Output of one row by the definition.
std::vector<double> expected(const problem &p, int t, int g) {
    const size_t keys = static_cast<size_t>(p.n_keys), row = static_cast<size_t>(t * p.group + g);
    const size_t width = static_cast<size_t>(p.head_qk), head_v = static_cast<size_t>(p.head_v);
    std::vector<double> score(keys), out(head_v, 0.0);
    double top = p.has_sinks ? p.sinks[static_cast<size_t>(g)] : -INFINITY;
    for (size_t j = 0; j < keys; ++j) {
        double s = 0;
        for (size_t d = 0; d < width; ++d) s += static_cast<double>(p.q[row * width + d]) * p.k[j * width + d];
        if (p.soft_cap != 0) s = p.soft_cap * std::tanh(s / p.soft_cap);
        if (p.has_mask)
            s += static_cast<double>(p.slopes[static_cast<size_t>(g)]) * p.mask[static_cast<size_t>(t) * keys + j];
        score[j] = s;
        top = std::max(top, s);
    }
    if (top == -INFINITY) return out;
    double sum = p.has_sinks ? std::exp(p.sinks[static_cast<size_t>(g)] - top) : 0.0;
    for (size_t j = 0; j < keys; ++j) {
        const double w = std::exp(score[j] - top);
        sum += w;
        for (size_t d = 0; d < head_v; ++d) out[d] += w * p.v[j * head_v + d];
    }
    for (double &x : out) x /= sum;
    return out;
}

/// Largest difference to the definition, relative to the largest value (which is about 1); infinity if a guard was hit.
double largest_error(const agq::attention_kernel &kern, const problem &p) {
    const size_t width = static_cast<size_t>(p.head_qk), head_v = static_cast<size_t>(p.head_v);
    const size_t blocks = (static_cast<size_t>(p.n_keys) + agq::attention_keys - 1) / agq::attention_keys;
    std::vector<float> keys(blocks * width * agq::attention_keys), values(blocks * agq::attention_keys * head_v);
    for (size_t j = 0; j < static_cast<size_t>(p.n_keys); ++j) {
        for (size_t d = 0; d < width; ++d) {
            keys[(j / agq::attention_keys * width + d) * agq::attention_keys + j % agq::attention_keys] =
                p.k[j * width + d];
        }
        std::copy_n(&p.v[j * head_v], head_v, &values[j * head_v]);
    }
    std::vector<uint16_t> half;
    for (float x : p.mask) half.push_back(half_bits(x));
    std::vector<float> scratch(agq::attention_scratch_floats(p.head_v) + 16, guard);
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
    if (p.has_mask) {
        args.mask =
            p.mask_is_f16 ? reinterpret_cast<const char *>(half.data()) : reinterpret_cast<const char *>(p.mask.data());
        args.mask_stride = static_cast<size_t>(p.n_keys) * (p.mask_is_f16 ? 2 : 4);
        args.mask_is_f16 = p.mask_is_f16;
    }
    args.slopes = p.slopes.data();
    args.soft_cap = p.soft_cap;
    args.sinks = p.has_sinks ? p.sinks.data() : nullptr;
    args.out = out.data();
    args.out_token_stride = static_cast<int64_t>(token_stride);
    args.out_head_stride = p.head_v;
    args.scratch = scratch.data();
    kern.attend(args);

    double worst = 0;
    for (int t = 0; t < p.tokens; ++t) {
        for (int g = 0; g < p.group; ++g) {
            const std::vector<double> want = expected(p, t, g);
            const float *found = &out[static_cast<size_t>(t) * token_stride + static_cast<size_t>(g) * head_v];
            for (size_t d = 0; d < head_v; ++d) worst = std::max(worst, std::fabs(found[d] - want[d]));
        }
        for (size_t i = 0; i < 3; ++i) {
            if (out[static_cast<size_t>(t) * token_stride + token_stride - 3 + i] != guard) return INFINITY;
        }
    }
    const auto untouched = [](const std::vector<float> &v) {
        return std::all_of(v.end() - 16, v.end(), [](float x) { return x == guard; });
    };
    return untouched(out) && untouched(scratch) && worst == worst ? worst : INFINITY;
}

bool check_conversion(const agq::attention_kernel &kern) {
    std::vector<uint16_t> from(65536);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
    std::vector<float> to(from.size()), wanted(from.size());
    kern.f16_to_f32(from.data(), to.data(), 65536 - 3);
    agq::attention_generic.f16_to_f32(from.data(), wanted.data(), 65536 - 3);
    for (size_t i = 0; i < from.size() - 3; ++i) {
        const bool nan = (i & 0x7C00) == 0x7C00 && (i & 1023);
        if (nan ? to[i] == to[i] : to[i] != wanted[i]) return false;
    }
    return wanted[0x3C00] == 1.0f && wanted[0x8001] == -0x1p-24f && wanted[0xFC00] == -INFINITY &&
           wanted[0x7BFF] == 65504.0f;
}

}  // namespace

int main(int argc, char **argv) {
    unsigned seed = std::random_device{}();
    if (argc == 3 && std::string(argv[1]) == "--seed") seed = static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10));
    std::printf("seed %u\n", seed);
    // Scores of size 30 and sums of 300 terms in binary32 leave an error of about 1e-5 in weights that add up to 1.
    constexpr double tolerance = 1e-4;
    int failures = 0, tested = 0;
    for (const agq::kernel *row : agq::compiled_kernels()) {
        if (!row->supported() || !row->attention) continue;
        ++tested;
        std::mt19937 rng(seed);
        double worst = 0;
        for (int round = 0; round < 200; ++round) {
            const double error = largest_error(*row->attention, random_problem(rng));
            if (!(error < tolerance)) {
                std::printf("%s: round %d differs by %g\n", row->name, round, error);
                ++failures;
            }
            worst = std::max(worst, error);
        }
        if (!check_conversion(*row->attention)) {
            std::printf("%s: conversion from binary16 is wrong\n", row->name);
            ++failures;
        }
        std::printf("%s: largest difference %.2g\n", row->name, worst);
    }
    return failures == 0 && tested > 0 ? 0 : 1;
}
