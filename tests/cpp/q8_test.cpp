// Compares every kernel for Q8_0 that this CPU can run with a slow, obvious product. If all scales are one power of
// two, all sums are exact, so results must be equal bit for bit; else they may differ by the rounding of binary32.
// Also: a result does not depend on the other rows and tokens of a call; NaN, infinities and zeros; nothing else is
// written. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "each_kernel.h"

namespace {

using agq::q8_bytes;
using agq::q8_columns;
using agq::q8_group;

constexpr float guard = 12345.0f;  // marks memory that a kernel must not write

struct problem {
    int64_t k, rows, tokens;
    bool exact;  ///< all scales are the same power of two
    std::vector<uint8_t> weights;
    std::vector<float> x;
};

/// 2^e as a binary16.
uint16_t half_power(int e) {
    return static_cast<uint16_t>((e + 15) << 10);
}

problem random_problem(std::mt19937 &rng) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    // 960 products of 128 and 127 add up to less than 2^24.
    problem p = {64 * pick(1, 15), pick(1, 40), pick(1, 20), pick(0, 1) == 1, {}, {}};
    p.weights.resize(static_cast<size_t>(p.rows * p.k / q8_columns * q8_bytes));
    p.x.resize(static_cast<size_t>(p.tokens * p.k));
    const bool extreme = pick(0, 3) == 0;
    const uint16_t power = half_power(pick(-2, 2));
    for (size_t b = 0; b < p.weights.size(); b += q8_bytes) {
        const uint16_t scale = p.exact ? power : static_cast<uint16_t>(pick(0x1000, 0x4000));
        std::memcpy(&p.weights[b], &scale, 2);
        for (size_t i = 2; i < q8_bytes; ++i) {
            p.weights[b + i] = static_cast<uint8_t>(extreme ? (pick(0, 1) == 1 ? -128 : 127) : pick(-128, 127));
        }
    }
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < p.x.size(); ++i) {
        const float integer = static_cast<float>(extreme ? (pick(0, 1) == 1 ? -127 : 127) : pick(-127, 127));
        p.x[i] = !p.exact ? normal(rng) : i % q8_columns == 0 ? 127.0f : integer;
    }
    return p;
}

/// What the formulas of kernels/q8.h say, in binary64. `sizes`, unless null, gets the sum of the terms' magnitudes.
double wanted(const problem &p, int64_t row, int64_t token, double *sizes) {
    double sum = 0, size = 0;
    for (int64_t b = 0; b < p.k / q8_columns; ++b) {
        const uint8_t *block = &p.weights[static_cast<size_t>((row * (p.k / q8_columns) + b) * q8_bytes)];
        const float *x = &p.x[static_cast<size_t>(token * p.k + b * q8_columns)];
        float amax = 0;
        for (int i = 0; i < q8_columns; ++i) amax = std::max(amax, std::fabs(x[i]));
        const float factor = amax > 0 ? 127.0f / amax : 0.0f;
        int64_t products = 0, magnitudes = 0;
        for (int i = 0; i < q8_columns; ++i) {
            const int64_t q = std::lrint(x[i] * factor), w = block[2 + i] - (block[2 + i] < 128 ? 0 : 256);
            products += q * w;
            magnitudes += std::abs(q * w);
        }
        uint16_t half;
        std::memcpy(&half, block, 2);
        const double scale = std::ldexp(1.0 + (half & 1023) / 1024.0, (half >> 10) - 15) * amax / 127.0;
        sum += scale * static_cast<double>(products);
        size += scale * static_cast<double>(magnitudes);
    }
    if (sizes) *sizes = size;
    return sum;
}

/// Results [tokens][rows] of a kernel, for rows and tokens from the given ones on.
std::vector<float> multiply(const agq::q8_kernel &kern, const problem &p, int64_t row, int64_t rows, int64_t token,
                            int64_t tokens) {
    std::vector<q8_group> packed(static_cast<size_t>(tokens * p.k / 64));
    for (int64_t t = 0; t < tokens; ++t) kern.pack(&p.x[(token + t) * p.k], p.k, &packed[t * p.k / 64]);
    std::vector<float> out(static_cast<size_t>(tokens * (rows + 1)), guard);
    std::vector<float *> dst(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) dst[static_cast<size_t>(t)] = &out[t * (rows + 1)];
    kern.multiply({&p.weights[row * (p.k / q8_columns) * q8_bytes], p.k, rows, packed.data(), tokens, dst.data()});
    std::vector<float> results(static_cast<size_t>(tokens * rows));
    for (int64_t t = 0; t < tokens; ++t) {
        if (dst[t][rows] != guard) std::printf("a kernel wrote behind its rows\n"), std::exit(1);
        for (int64_t r = 0; r < rows; ++r) results[static_cast<size_t>(t * rows + r)] = dst[t][r];
    }
    return results;
}

int failures = 0;

void check(bool good, const agq::kernel &row, const problem &p, const char *what) {
    if (good || failures++ > 10) return;
    std::printf("%s, k %d, %d rows, %d tokens: %s\n", row.name, static_cast<int>(p.k), static_cast<int>(p.rows),
                static_cast<int>(p.tokens), what);
}

void test(const agq::kernel &row, std::mt19937 &rng) {
    if (!row.q8) return;
    for (int round = 0; round < 100; ++round) {
        problem p = random_problem(rng);
        const std::vector<float> got = multiply(*row.q8, p, 0, p.rows, 0, p.tokens);
        const auto at = [&](int64_t t, int64_t r) { return got[static_cast<size_t>(t * p.rows + r)]; };
        bool equal = true, close = true;
        for (int64_t t = 0; t < p.tokens; ++t) {
            for (int64_t r = 0; r < p.rows; ++r) {
                double size;
                const double want = wanted(p, r, t, &size);
                equal = equal && at(t, r) == want;
                // Each of k / 4 partial results is rounded at most three times.
                close = close && std::fabs(at(t, r) - want) <= 1e-6 * size;
            }
        }
        check(p.exact ? equal : close, row, p, p.exact ? "integers differ" : "results differ");

        const int64_t r = static_cast<int64_t>(rng() % p.rows), t = static_cast<int64_t>(rng() % p.tokens);
        check(multiply(*row.q8, p, r, 1, t, 1)[0] == at(t, r), row, p, "a row and token alone has other bits");

        problem bad = p;
        const float faults[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                                -std::numeric_limits<float>::infinity()};
        bad.x[static_cast<size_t>(t * p.k) + rng() % p.k] = faults[round % 3];
        const std::vector<float> spoiled = multiply(*row.q8, bad, 0, p.rows, 0, p.tokens);
        bool only_there = true;
        for (size_t i = 0; i < spoiled.size(); ++i) {
            const bool there = static_cast<int64_t>(i) / p.rows == t;
            only_there = only_there && (there ? std::isnan(spoiled[i]) : spoiled[i] == got[i]);
        }
        check(only_there, row, p, "NaN or infinity in one token");

        std::fill_n(bad.x.begin() + static_cast<std::ptrdiff_t>(t * p.k), p.k, round % 2 == 0 ? 0.0f : 1e-38f);
        check(std::fabs(multiply(*row.q8, bad, r, 1, t, 1)[0]) == 0.0f, row, p, "zeros");
    }
}

}  // namespace

int main(int argc, char **argv) {
    for_each_kernel(argc, argv, test);
    return failures == 0 ? 0 : 1;
}
