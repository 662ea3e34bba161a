// Compares every attention kernel that this CPU can run with a plain softmax in double precision, over random shapes,
// masks and modes. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "attention_problem.h"
#include "kernels/kernel.h"
#include "kernels/select.h"

namespace {

/// Whether the kernel uses 16-bit integers.
bool in_integers(const agq::attention_kernel *kern) {
#if defined(__x86_64__)
    return kern != agq::kernel_scalar.attention;
#else
    (void)kern;
    return false;
#endif
}

/// Largest error from rounding queries, keys and values, divided by `unit`, to binary16.
double rounding_error(const problem &p, float unit) {
    problem rounded = p;
    for (std::vector<float> *part : {&rounded.q, &rounded.k, &rounded.v}) {
        for (float &x : *part) x = to_half_and_back(x / unit) * unit;
    }
    double worst = 0;
    for (int t = 0; t < p.tokens; ++t) {
        for (int g = 0; g < p.group; ++g) {
            const std::vector<double> a = expected(p, t, g), b = expected(rounded, t, g);
            for (size_t d = 0; d < a.size(); ++d) worst = std::max(worst, std::fabs(a[d] - b[d]));
        }
    }
    return worst;
}

/// The binary16 rounding error of a small problem varies by chance: takes the largest of three.
double rounding_error(const problem &p) {
    return std::max({rounding_error(p, 1.0f), rounding_error(p, 1.25f), rounding_error(p, 1.6f)});
}

/// Largest error of a kernel's output (values are about 1); infinity if the output is empty, because the kernel wrote
/// outside it.
double largest_error(const std::vector<float> &out, const problem &p) {
    if (out.empty()) return INFINITY;
    double worst = 0;
    size_t i = 0;
    for (int t = 0; t < p.tokens; ++t) {
        for (int g = 0; g < p.group; ++g) {
            for (const double want : expected(p, t, g)) worst = std::max(worst, std::fabs(out[i++] - want));
        }
    }
    return worst == worst ? worst : INFINITY;
}

/// Largest error of the softmax weights; infinity if the kernel wrote outside its output.
double largest_weights_error(const agq::attention_kernel &kern, problem p) {
    p.has_mask = true;  // this kernel requires a mask
    const size_t width = static_cast<size_t>(p.head_qk), keys = static_cast<size_t>(p.n_keys);
    const size_t padded = (keys + agq::attention_keys - 1) / agq::attention_keys * agq::attention_keys;
    std::vector<float> packed(padded * width, 0.0f);
    for (size_t j = 0; j < keys; ++j) {
        const size_t block = j / agq::attention_keys * agq::attention_keys;
        for (size_t d = 0; d < width; ++d)
            packed[block * width + d * agq::attention_keys + j - block] = p.k[j * width + d];
    }
    const std::vector<uint16_t> half = half_bits(p.mask);
    const size_t rows = static_cast<size_t>(p.tokens) * p.group, stride = padded + 5;
    std::vector<float> weights(rows * stride, guard);
    agq::softmax_weights_args args = {};
    args.n_tokens = p.tokens;
    args.group = p.group;
    args.head = p.head_qk;
    args.q = p.q.data();
    args.n_keys = p.n_keys;
    args.keys = packed.data();
    args.mask =
        p.mask_is_f16 ? reinterpret_cast<const char *>(half.data()) : reinterpret_cast<const char *>(p.mask.data());
    args.mask_stride = keys * (p.mask_is_f16 ? 2 : 4);
    args.mask_is_f16 = p.mask_is_f16;
    args.slopes = p.slopes.data();
    args.soft_cap = p.soft_cap;
    args.sinks = p.has_sinks ? p.sinks.data() : nullptr;
    args.weights = weights.data();
    args.stride = static_cast<int64_t>(stride);
    kern.weights(args);
    double worst = 0;
    for (size_t r = 0; r < rows; ++r) {
        const float *row = &weights[r * stride];
        const std::vector<double> wanted =
            expected_softmax(p, static_cast<int>(r) % p.group,
                             expected_scores(p, static_cast<int>(r) / p.group, static_cast<int>(r) % p.group));
        for (size_t j = 0; j < keys; ++j) worst = std::max(worst, std::fabs(row[j] - wanted[j]));
        for (size_t j = padded; j < stride; ++j) {
            if (row[j] != guard) return INFINITY;
        }
        if (std::any_of(row, row + keys, [](float x) { return x != x; })) return INFINITY;
    }
    return worst;
}

/// A number that is not finite must affect the rows that see it, and no others.
bool check_not_finite(const agq::attention_kernel &kern, std::mt19937 &rng) {
    for (int where = 0; where < 3; ++where) {
        problem p;
        do p = random_problem(rng);
        while (!p.has_mask || p.n_keys < 2 || p.tokens < 2);
        // Only token 1 sees key 1.
        std::vector<float> &part = where == 0 ? p.q : where == 1 ? p.k : p.v;
        const size_t keys = static_cast<size_t>(p.n_keys);
        for (int t = 0; t < p.tokens; ++t) {
            p.mask[static_cast<size_t>(t) * keys] = 0;
            p.mask[static_cast<size_t>(t) * keys + 1] = t == 1 ? 0 : -INFINITY;
        }
        const size_t width = static_cast<size_t>(where == 2 ? p.head_v : p.head_qk);
        part[where == 0 ? static_cast<size_t>(p.group) * width : width] = NAN;
        const std::vector<float> out = run(kern, p);
        if (out.empty()) return false;
        const size_t token_floats = static_cast<size_t>(p.group) * p.head_v;
        for (size_t i = 0; i < out.size(); ++i) {
            const bool concerned =
                i / token_floats == 1 && (where > 0 || i % token_floats < static_cast<size_t>(p.head_v));
            // In a binary32 kernel, hidden keys that are not finite may also affect a row.
            if (concerned ? std::isfinite(out[i]) && (where < 2 || i % static_cast<size_t>(p.head_v) == 0)
                          : !std::isfinite(out[i]) && in_integers(&kern)) {
                std::printf("not finite in part %d: output %zu is %g\n", where, i, static_cast<double>(out[i]));
                return false;
            }
        }
    }
    return true;
}

/// A score beyond binary32 and a sink that is NaN must give NaN, not the softmax over the other keys.
bool check_overflow(const agq::attention_kernel &kern, std::mt19937 &rng) {
    for (const bool sink : {false, true}) {
        problem p;
        do p = random_problem(rng);
        while (p.has_mask || p.soft_cap != 0 || p.n_keys < 70 || p.has_sinks != sink);
        const size_t head_qk = static_cast<size_t>(p.head_qk);
        if (sink) {
            p.sinks[0] = NAN;
        } else {
            std::fill_n(p.q.begin(), head_qk, 1e20f);
            std::fill_n(p.k.begin() + static_cast<std::ptrdiff_t>(head_qk), head_qk, 1e20f);
        }
        const std::vector<float> out = run(kern, p);
        if (!out.empty() && std::isnan(out[0])) continue;
        std::printf("%s: the first output is %g\n", sink ? "sink" : "overflow",
                    out.empty() ? 0.0 : static_cast<double>(out[0]));
        return false;
    }
    return true;
}

/// A token's result must not depend, by a single bit, on the other tokens of the call or on what it does not see.
bool check_independence(const agq::attention_kernel &kern, std::mt19937 &rng) {
    for (int round = 0; round < 40; ++round) {
        problem p;
        do p = random_problem(rng);
        while (!p.has_mask || p.tokens < 2);
        const std::vector<float> together = run(kern, p);
        if (together.empty()) return false;
        const size_t t = std::uniform_int_distribution<size_t>(0, static_cast<size_t>(p.tokens) - 1)(rng);
        const size_t keys = static_cast<size_t>(p.n_keys), group = static_cast<size_t>(p.group);
        const size_t head_qk = static_cast<size_t>(p.head_qk), head_v = static_cast<size_t>(p.head_v);
        const auto part = [t](const std::vector<float> &x, size_t n) {
            const auto begin = x.begin() + static_cast<std::ptrdiff_t>(t * n);
            return std::vector<float>(begin, begin + static_cast<std::ptrdiff_t>(n));
        };
        problem one = p;
        one.tokens = 1;
        one.q = part(p.q, group * head_qk);
        one.mask = part(p.mask, keys);
        for (size_t j = 0; j < keys; ++j) {
            if (one.mask[j] != -INFINITY) continue;
            for (size_t d = 0; d < head_qk; ++d) one.k[j * head_qk + d] = 1 - 3 * one.k[j * head_qk + d];
            for (size_t d = 0; d < head_v; ++d) one.v[j * head_v + d] = 1 - 3 * one.v[j * head_v + d];
        }
        if (run(kern, one) == part(together, group * head_v)) continue;
        std::printf("round %d: token %zu of %d gets other bits alone\n", round, t, p.tokens);
        return false;
    }
    return true;
}

/// Where 16-bit integers come nearest to their limits: equal channels, keys and values; and values of zero.
bool check_limits(const agq::attention_kernel &kern, double tolerance) {
    for (const int head_qk : {1024, 1023}) {
        for (const float value : {1.0f, -65504.0f, 0.0f}) {
            problem p;
            p.tokens = 8;
            p.group = 1;
            p.head_qk = head_qk;
            p.head_v = 64;
            p.n_keys = 128;
            p.has_mask = p.mask_is_f16 = p.has_sinks = false;
            p.soft_cap = 0;
            const size_t tokens = static_cast<size_t>(p.tokens), keys = static_cast<size_t>(p.n_keys);
            p.q.assign(tokens * static_cast<size_t>(head_qk), 0.1f);
            p.k.assign(keys * static_cast<size_t>(head_qk), -0.1f);
            p.v.assign(keys * static_cast<size_t>(p.head_v), value);
            p.mask.assign(tokens * keys, 0);
            p.slopes = {1};
            const double size = std::fabs(static_cast<double>(value)), error = largest_error(run(kern, p), p);
            if (error <= tolerance * size) continue;
            std::printf("head %d, values %g: differs by %g\n", head_qk, size, error);
            return false;
        }
    }
    return true;
}

/// Decodes binary16 by its definition.
float half_value(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float size = exponent == 31 ? INFINITY
                       : exponent     ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
    return h & 0x8000 ? -size : size;
}

bool check_conversion(const agq::attention_kernel &kern) {
    std::vector<uint16_t> from(65536);
    for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
    std::vector<float> to(from.size()), wanted(from.size());
    if (kern.few) {
        // Rows of 9; the last ends with the array. Prefetches may go past it.
        std::vector<float> rows(7281 * 10 + 10, guard);
        kern.few->read_f16(reinterpret_cast<const char *>(from.data()), 18, 7281, 9, rows.data(), 10, 1 << 20);
        for (size_t i = 0; i < rows.size(); ++i) {
            const uint16_t h = from[std::min<size_t>(i / 10 * 9 + i % 10, 65535)];
            const bool nan = (h & 0x7C00) == 0x7C00 && (h & 1023);
            const bool beside = i % 10 == 9 || i >= 72810;
            if (!nan && rows[i] != (beside ? guard : half_value(h))) return false;
        }
    }
    kern.f16_to_f32(from.data(), to.data(), 65536 - 3);
    agq::kernel_scalar.attention->f16_to_f32(from.data(), wanted.data(), 65536 - 3);
    for (size_t i = 0; i < from.size() - 3; ++i) {
        const bool nan = (i & 0x7C00) == 0x7C00 && (i & 1023);
        if (nan ? !std::isnan(to[i]) : to[i] != wanted[i]) return false;
    }
    return wanted[0x3C00] == 1.0f && wanted[0x8001] == -0x1p-24f && wanted[0xFC00] == -INFINITY &&
           wanted[0x7BFF] == 65504.0f;
}

}  // namespace

int main(int argc, char **argv) {
    unsigned seed = std::random_device{}();
    if (argc == 3 && std::string(argv[1]) == "--seed") seed = static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10));
    std::printf("seed %u\n", seed);
    // Scores up to 30 and sums of 300 terms in binary32 leave an error of about 1e-5 in weights that sum to 1.
    constexpr double tolerance = 1e-4;
    int failures = 0;
    std::set<const agq::attention_kernel *> tested;
    for (const agq::kernel *row : agq::compiled_kernels()) {
        if (!row->supported() || !row->attention) continue;
        if (!tested.insert(row->attention).second) {
            std::printf("%s: has the attention of a kernel above\n", row->name);
            continue;
        }
        std::mt19937 rng(seed);
        // A kernel with 16-bit integers may have about the same error as the host, which rounds to binary16.
        const bool integers = in_integers(row->attention);
        double worst = 0, few_worst = 0;
        for (int round = 0; round < 200; ++round) {
            const problem p = random_problem(rng);
            const double error = largest_error(run(*row->attention, p), p);
            const double allowed = tolerance + (integers ? 1.5 * rounding_error(p) : 0);
            if (!(error < allowed)) {
                std::printf("%s: round %d differs by %g, allowed are %g\n", row->name, round, error, allowed);
                ++failures;
            }
            worst = std::max(worst, integers ? error / allowed * tolerance : error);
        }
        for (int round = 0; round < 20; ++round) {
            const double error = largest_weights_error(*row->attention, random_problem(rng));
            if (error < tolerance) continue;
            std::printf("%s: softmax weights of round %d differ by %g\n", row->name, round, error);
            ++failures;
        }
        for (int round = 0; row->attention->few && round < 200; ++round) {
            const problem p = random_problem(rng);
            const double error = largest_error(run_few(*row->attention->few, p, round % 2 == 1), p);
            few_worst = std::max(few_worst, error);
            if (error < tolerance) continue;
            std::printf("%s: round %d of few rows differs by %g\n", row->name, round, error);
            ++failures;
        }
        failures += !check_not_finite(*row->attention, rng);
        failures += !check_overflow(*row->attention, rng);
        failures += !check_independence(*row->attention, rng);
        failures += !check_limits(*row->attention, tolerance);
        if (!check_conversion(*row->attention)) {
            std::printf("%s: conversion from binary16 is wrong\n", row->name);
            ++failures;
        }
        std::printf("%s: largest difference %.0f%% of what is allowed, few rows %.0f%%\n", row->name,
                    100 * worst / tolerance, 100 * few_worst / tolerance);
    }
    return failures == 0 && !tested.empty() ? 0 : 1;
}
