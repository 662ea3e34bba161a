// Compares the activation quantizers with the formulas of docs/format.md; a part of kernels_test.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "checks.h"
#include "kernels/kernel.h"

namespace {

using namespace agq;

struct quantized {
    std::vector<int8_t> q;      // [k][tokens]
    std::vector<int32_t> bias;  // [k / 64][tokens]
    std::vector<float> scale;   // [k / 64 or 1][tokens]
};

/// Runs a kernel's quantizer block by block and unpacks the result.
quantized run_quantizer(const kernel &row, const activation_format &format, const std::vector<const float *> &rows) {
    const int tokens = static_cast<int>(rows.size());
    const int groups = format.k / 64, scales = format.per_group ? groups : 1;
    quantized result;
    result.q.resize(static_cast<size_t>(format.k) * tokens);
    result.bias.resize(static_cast<size_t>(groups) * tokens);
    result.scale.resize(static_cast<size_t>(scales) * tokens);
    for (int begin = 0; begin < tokens; begin += row.nr) {
        const int n = std::min(row.nr, tokens - begin);
        guarded<int8_t> q(static_cast<size_t>(format.k) * n);
        guarded<int32_t> bias(static_cast<size_t>(groups) * n);
        guarded<float> scale(static_cast<size_t>(scales) * n);
        row.quantize(format, rows.data() + begin, {q.data(), bias.data(), scale.data(), n});
        const int offset = format.bits == 4 ? row.offset4 : 0;
        CHECK(q.intact() && bias.intact() && scale.intact(), "%s: quantizer wrote outside", row.name);
        for (int t = 0; t < n; t++) {
            for (int k = 0; k < format.k; k++) {
                result.q[static_cast<size_t>(k) * tokens + begin + t] =
                    static_cast<int8_t>(q[(k / row.kr * n + t) * row.kr + k % row.kr] - offset);
            }
            for (int g = 0; g < groups; g++) {
                result.bias[static_cast<size_t>(g) * tokens + begin + t] = bias[g * n + t];
            }
            for (int i = 0; i < scales; i++) {
                result.scale[static_cast<size_t>(i) * tokens + begin + t] = scale[i * n + t];
            }
        }
    }
    return result;
}

/// The rotation, recursively: rotates both halves, then takes their sum and their difference.
std::vector<float> rotate_by_definition(const std::vector<float> &x) {
    if (x.size() == 1) return {x[0] * 0.125f};
    const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
    const auto first = rotate_by_definition({x.begin(), middle}), second = rotate_by_definition({middle, x.end()});
    std::vector<float> sums, differences;
    for (size_t i = 0; i < first.size(); i++) {
        sums.push_back(first[i] + second[i]);
        differences.push_back(first[i] - second[i]);
    }
    sums.insert(sums.end(), differences.begin(), differences.end());
    return sums;
}

/// Values of a row in stored order [k], refined, and rotated if the format says so.
std::vector<float> values_by_definition(const activation_format &format, const std::vector<int> &order,
                                        const float *row) {
    std::vector<float> found;
    for (int g = 0; g < format.k / 64; g++) {
        std::vector<float> values;
        for (int k = 64 * g; k < 64 * (g + 1); k++) {
            values.push_back(row[order[k]] * std::exp2(-static_cast<float>(format.exponents[g])));
        }
        if (format.rotated) values = rotate_by_definition(values);
        found.insert(found.end(), values.begin(), values.end());
    }
    return found;
}

/// The formulas of docs/format.md again, in a form that shares nothing with scalar.cpp.
quantized quantize_by_definition(const activation_format &format, const std::vector<const float *> &rows) {
    const int tokens = static_cast<int>(rows.size());
    const int groups = format.k / 64, scales = format.per_group ? groups : 1, span = format.k / scales;
    std::vector<int> order(format.listed, format.listed + format.n_listed);
    for (int c = 0; c < format.k; c++) {
        if (std::find(order.begin(), order.begin() + format.n_listed, c) == order.begin() + format.n_listed) {
            order.push_back(c);
        }
    }
    const float b = format.bits == 8 ? 127.0f : 7.0f;
    quantized result;
    result.q.assign(static_cast<size_t>(format.k) * tokens, 0);
    result.bias.assign(static_cast<size_t>(groups) * tokens, 0);
    result.scale.assign(static_cast<size_t>(scales) * tokens, std::numeric_limits<float>::quiet_NaN());
    for (int t = 0; t < tokens; t++) {
        const std::vector<float> values = values_by_definition(format, order, rows[t]);
        if (!std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); })) continue;
        for (int i = 0; i < scales; i++) {
            volatile float amax = 0;
            for (int k = i * span; k < (i + 1) * span; k++) {
                if (std::fabs(values[k]) > amax) amax = std::fabs(values[k]);
            }
            volatile float s = amax / b, f = b / amax;
            if (amax < std::exp2(-100.0f)) s = f = 0;
            result.scale[static_cast<size_t>(i) * tokens + t] = s;
            for (int k = i * span; k < (i + 1) * span; k++) {
                volatile float v = values[k];
                v = v * f;
                const double exact = v;
                double nearest = std::floor(exact);
                const double rest = exact - nearest;
                if (rest > 0.5 || (rest == 0.5 && std::fmod(nearest, 2.0) != 0)) nearest += 1;
                const int value = static_cast<int>(std::max(-double(b), std::min(double(b), nearest)));
                result.q[static_cast<size_t>(k) * tokens + t] = static_cast<int8_t>(value);
                result.bias[static_cast<size_t>(k / 64) * tokens + t] -= 64 * value;
            }
        }
    }
    return result;
}

/// One value of a row: usually ordinary, sometimes a rounding tie, tiny or huge.
float random_activation(int kind) {
    switch (kind) {
        case 0:
            return random_float(-1, 1);
        case 1:
            return std::normal_distribution<float>(0, 1)(rng) * (chance(50) ? 100.0f : 1.0f);
        case 2:
            return 0.5f * static_cast<float>(random_int(-254, 254));  // with amax 127 every second one is a tie
        case 3:
            return std::ldexp(random_float(-1, 1), random_int(-149, 127));
        case 4:
            return std::ldexp(random_float(-1, 1), random_int(-149, -100));
        case 5:
            return chance(2) ? std::numeric_limits<float>::max() : -std::numeric_limits<float>::max();
        case 6:
            return chance(2) ? 0.0f : -0.0f;
        default:
            return std::ldexp(random_float(-1, 1), -118 + random_int(0, 20));  // near the limit of 2^-100
    }
}

void fill_row(float *row, int k) {
    const int kind = random_int(0, 7);
    for (int i = 0; i < k; i++) row[i] = random_activation(kind);
    if (kind == 2) row[random_int(0, k - 1)] = chance(2) ? 127.0f : -127.0f;
    if (kind == 4 && chance(2)) row[random_int(0, k - 1)] = std::ldexp(1.0f, -100);  // the limit: not yet zero
    if (chance(8)) {
        const float bad[] = {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(),
                             std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
        row[random_int(0, k - 1)] = bad[random_int(0, 3)];
    }
}

void test_quantizers(const std::vector<const kernel *> &kernels) {
    const int k = 64 * random_int(1, chance(4) ? 48 : 12);
    const int tokens = random_int(1, 30);
    guarded<uint8_t> exponents(k / 64);
    for (size_t g = 0; g < exponents.size(); g++) exponents[g] = chance(3) ? random_int(0, 15) : 0;

    int n_listed = 0;
    if (chance(2)) n_listed = chance(4) ? k : chance(3) ? random_int(1, k) : random_int(1, std::min(k, 100));
    std::vector<int> channels(k);
    for (int c = 0; c < k; c++) channels[c] = c;
    std::shuffle(channels.begin(), channels.end(), rng);
    guarded<uint16_t> listed(n_listed), listed_sorted(n_listed);
    std::copy_n(channels.begin(), n_listed, listed.data());
    std::copy_n(channels.begin(), n_listed, listed_sorted.data());
    std::sort(listed_sorted.data(), listed_sorted.data() + n_listed);

    std::vector<std::unique_ptr<guarded<float>>> storage;
    std::vector<const float *> rows;
    for (int t = 0; t < tokens; t++) {
        storage.push_back(std::make_unique<guarded<float>>(k));
        fill_row(storage.back()->data(), k);
        rows.push_back(storage.back()->data());
    }
    const bool per_group = chance(2);
    const activation_format format = {k,
                                      chance(2) ? 8 : 4,
                                      per_group,
                                      exponents.data(),
                                      n_listed > 0 ? listed.data() : nullptr,
                                      n_listed > 0 ? listed_sorted.data() : nullptr,
                                      n_listed,
                                      per_group && chance(2)};
    const quantized want = quantize_by_definition(format, rows);
    for (const kernel *row : kernels) {
        const quantized got = run_quantizer(*row, format, rows);
        const auto where = [&] {
            static char text[100];
            std::snprintf(text, sizeof text, "%s, k %d, %d tokens, %d bits, per_group %d, rotated %d, %d listed",
                          row->name, k, tokens, format.bits, format.per_group, format.rotated, n_listed);
            return text;
        };
        CHECK(got.q == want.q, "%s", where());
        CHECK(got.bias == want.bias, "%s", where());
        bool scales_equal = true;
        for (size_t i = 0; i < want.scale.size(); i++) scales_equal &= same_bits(got.scale[i], want.scale[i]);
        CHECK(scales_equal, "%s", where());
    }
}

}  // namespace
