// Compares every row kernel that this CPU can run with the host's order of operations, bit for bit, and swiglu with
// binary64, over random lengths. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "each_kernel.h"

namespace {

constexpr float guard = 12345.0f;  // marks memory that a kernel must not write

using row = std::vector<float>;

row random_row(std::mt19937 &rng, size_t n, float size) {
    std::normal_distribution<float> normal;
    row x(n);
    for (float &v : x) v = normal(rng) * size;
    return x;
}

row wanted_rms_norm(const row &x, const row &weight, float eps) {
    double sum = 0;
    for (float v : x) sum += static_cast<double>(v * v);
    const float mean = static_cast<float>(sum / static_cast<double>(x.size()));
    const float scale = 1.0f / std::sqrt(mean + eps);
    row y(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        y[i] = x[i] * scale;
        y[i] *= weight[i];
    }
    return y;
}

row wanted_layer_norm(const row &x, const row &weight, const row *bias, float eps) {
    double sum = 0, squares = 0;
    for (float v : x) sum += static_cast<double>(v);
    const float mean = static_cast<float>(sum) / static_cast<float>(x.size());
    row y(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        y[i] = x[i] - mean;
        squares += static_cast<double>(y[i] * y[i]);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(x.size())) + eps);
    for (size_t i = 0; i < x.size(); ++i) {
        y[i] *= scale;
        y[i] *= weight[i];
        if (bias) y[i] += (*bias)[i];
    }
    return y;
}

/// Distance between two numbers of the same sign, in units in the last place.
int64_t steps_between(float a, float b) {
    int32_t bits_a, bits_b;
    std::memcpy(&bits_a, &a, 4);
    std::memcpy(&bits_b, &b, 4);
    return std::abs(static_cast<int64_t>(bits_a) - bits_b);
}

int failures = 0;

void expect(bool good, const char *kernel, const char *what, size_t n) {
    if (good) return;
    std::printf("%s: %s of %zu numbers is wrong\n", kernel, what, n);
    ++failures;
}

/// Runs `work` on memory followed by a guard.
template <class work>
row guarded(size_t n, const work &run) {
    row y(n + 1, guard);
    run(y.data());
    if (y[n] != guard) return {};
    y.resize(n);
    return y;
}

void test_swiglu_oai(const char *name, const agq::row_kernel &kern, const row &gate, const row &up) {
    constexpr float alpha = 1.702f, limit = 7;
    const size_t n = gate.size();
    const row found = guarded(
        n, [&](float *y) { kern.swiglu_oai(gate.data(), up.data(), alpha, limit, static_cast<int64_t>(n), y); });
    bool close = found.size() == n;
    for (size_t i = 0; close && i < n; ++i) {
        const float g = std::min(gate[i], limit), u = std::max(-limit, std::min(up[i], limit)), power = alpha * g;
        const double wanted = g / (1 + std::exp(-static_cast<double>(power))) * static_cast<double>(u + 1.0f);
        close = power < -86 ? std::fabs(found[i]) < 1e-30f : steps_between(found[i], static_cast<float>(wanted)) <= 8;
    }
    expect(close, name, "swiglu_oai", n);
}

void test_weighted_sum(const char *name, const agq::row_kernel &kern, std::mt19937 &rng, size_t n, float size) {
    const int count = std::uniform_int_distribution<int>(1, 8)(rng);
    const bool biased = rng() % 2, written = rng() % 2, in_place = rng() % 2;
    const row weights = random_row(rng, static_cast<size_t>(count), 1);
    std::vector<row> x, bias, terms;
    row wanted(n);
    std::vector<row> wanted_terms;
    for (int e = 0; e < count; ++e) {
        x.push_back(random_row(rng, n, size));
        bias.push_back(random_row(rng, n, size));
        terms.emplace_back(n, guard);
        wanted_terms.push_back(x.back());
        for (size_t i = 0; i < n; ++i) {
            float &term = wanted_terms.back()[i];
            if (biased) term += bias.back()[i];
            term *= weights[static_cast<size_t>(e)];
            wanted[i] = e == 0 ? term : wanted[i] + term;
        }
    }
    std::vector<const float *> inputs, biases;
    std::vector<float *> results;
    for (size_t e = 0; e < x.size(); ++e) {
        inputs.push_back(x[e].data());
        biases.push_back(bias[e].data());
        results.push_back(in_place ? x[e].data() : terms[e].data());
    }
    const row found = guarded(n, [&](float *y) {
        kern.weighted_sum(inputs.data(), biased ? biases.data() : nullptr, weights.data(), count,
                          static_cast<int64_t>(n), written ? results.data() : nullptr, y);
    });
    expect(found == wanted, name, "weighted_sum", n);
    expect(!written || (in_place ? x : terms) == wanted_terms, name, "terms of weighted_sum", n);
}

void test_kernel(const char *name, const agq::row_kernel &kern, std::mt19937 &rng) {
    for (int round = 0; round < 300; ++round) {
        const size_t n = static_cast<size_t>(std::uniform_int_distribution<int>(1, round % 3 ? 700 : 40)(rng));
        const int64_t length = static_cast<int64_t>(n);
        const float size = std::exp2(std::uniform_real_distribution<float>(-8, 5)(rng));
        const row a = random_row(rng, n, size), b = random_row(rng, n, size), bias = random_row(rng, n, 1);
        const row sum = guarded(n, [&](float *y) { kern.add(a.data(), b.data(), length, y); });
        bool equal = sum.size() == n;
        for (size_t i = 0; equal && i < n; ++i) equal = sum[i] == a[i] + b[i];
        expect(equal, name, "add", n);
        const float eps = round % 2 ? 1e-5f : 1e-12f;
        expect(guarded(n, [&](float *y) { kern.rms_norm(a.data(), b.data(), eps, length, y); }) ==
                   wanted_rms_norm(a, b, eps),
               name, "rms_norm", n);
        const row *given = round % 4 ? &bias : nullptr;
        const row normed = guarded(
            n, [&](float *y) { kern.layer_norm(a.data(), b.data(), given ? bias.data() : nullptr, eps, length, y); });
        expect(n < 2 || normed == wanted_layer_norm(a, b, given, eps), name, "layer_norm", n);
        const row gated = guarded(n, [&](float *y) { kern.swiglu(a.data(), b.data(), length, y); });
        bool close = gated.size() == n;
        for (size_t i = 0; close && i < n; ++i) {
            const double gate = a[i], wanted = gate / (1 + std::exp(-gate)) * b[i];
            // The exponential is clamped at e^87; the difference is far too small for int8.
            close =
                gate < -86 ? std::fabs(gated[i]) < 1e-30f : steps_between(gated[i], static_cast<float>(wanted)) <= 8;
        }
        expect(close, name, "swiglu", n);
        test_swiglu_oai(name, kern, a, b);
        test_weighted_sum(name, kern, rng, n, size);
        // In place, as in the host's graphs.
        row place = a;
        kern.rms_norm(place.data(), b.data(), eps, length, place.data());
        expect(place == wanted_rms_norm(a, b, eps), name, "rms_norm in place", n);
    }
    // Values that are not finite must stay so.
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        row a = random_row(rng, 64, 1), y(64);
        const row b = random_row(rng, 64, 1);
        a[7] = bad;
        kern.swiglu(a.data(), b.data(), 64, y.data());
        expect(!std::isfinite(y[7]) && std::isfinite(y[6]), name, "swiglu of what is not finite", 64);
        kern.rms_norm(a.data(), b.data(), 1e-5f, 64, y.data());
        expect(std::isnan(y[7]), name, "rms_norm of what is not finite", 64);
    }
}

}  // namespace

int main(int argc, char **argv) {
    for_each_kernel(argc, argv,
                    [](const agq::kernel &kern, std::mt19937 &rng) { test_kernel(kern.name, *kern.rows, rng); });
    return failures == 0 ? 0 : 1;
}
