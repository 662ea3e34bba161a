// Compares the products of every kernel with exact integers and with binary64; a part of kernels_test.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "checks.h"
#include "kernels/kernel.h"

namespace {

using namespace agq;

/// A product in plain form: indexed matrices, not packed.
struct problem {
    int k, panels, tokens;
    int bits;
    bool per_group;
    float tensor_scale;
    uint8_t codebook[16];
    std::vector<uint8_t> codes;  // [panels * 16][k]
    std::vector<uint16_t> d;     // [panels * 16][k / 64], binary16 bits
    std::vector<int8_t> q;       // [tokens][k]
    std::vector<float> scale;    // [tokens][k / 64 or 1]

    int rows() const { return panels * 16; }
    int groups() const { return k / 64; }
};

double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const double magnitude =
        exponent == 0 ? std::ldexp(bits & 1023, -24) : std::ldexp((bits & 1023) + 1024, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

constexpr int columns_of_models[] = {64, 192, 576, 960, 2880};

/// Random shape, codes, codebook and activations; the caller sets the scales.
problem random_problem() {
    problem p;
    p.k = 64 * random_int(1, chance(4) ? 64 : 10);
    if (chance(8)) p.k = columns_of_models[random_int(0, 4)];
    p.panels = random_int(1, 7);
    p.tokens = chance(20) ? random_int(190, 400) : random_int(1, 70);
    if (p.tokens > 70) p.k = std::min(p.k, 1024);
    p.per_group = chance(2);
    p.bits = chance(3) ? 4 : 8;
    p.tensor_scale = 1.0f;
    for (uint8_t &u : p.codebook) u = static_cast<uint8_t>(random_int(0, 127));
    std::sort(p.codebook, p.codebook + 16);
    if (chance(3)) p.codebook[0] = 0, p.codebook[15] = 127;
    if (chance(10)) std::memset(p.codebook, chance(2) ? 0 : 127, 16);

    p.codes.resize(static_cast<size_t>(p.rows()) * p.k);
    const int code_kind = random_int(0, 5);  // 0: all 0, 1: all 15, otherwise random
    for (uint8_t &code : p.codes) code = static_cast<uint8_t>(code_kind < 2 ? 15 * code_kind : random_int(0, 15));
    p.q.resize(static_cast<size_t>(p.tokens) * p.k);
    const int q_kind = random_int(0, 5);  // 0, 1: the extremes, 2: both, otherwise random
    const int b = p.bits == 4 ? 7 : 127;
    for (int8_t &x : p.q) {
        const int value = q_kind == 0 ? b : q_kind == 1 ? -b : q_kind == 2 ? (chance(2) ? b : -b) : random_int(-b, b);
        x = static_cast<int8_t>(value);
    }
    p.d.resize(static_cast<size_t>(p.rows()) * p.groups());
    p.scale.resize(static_cast<size_t>(p.tokens) * (p.per_group ? p.groups() : 1));
    return p;
}

/// Packs weights in file form. The attribute bytes are random; kernels must not read them.
void pack_weights(const problem &p, uint8_t *bytes) {
    const int groups = p.groups();
    for (int i = 0; i < p.rows() * groups * 34; i++) bytes[i] = static_cast<uint8_t>(random_int(0, 255));
    for (int m = 0; m < p.rows(); m++) {
        const int r = m % 16;
        for (int g = 0; g < groups; g++) {
            uint8_t *tile = bytes + m / 16 * groups * 544 + g / 2 * 1088;
            const bool alone = g % 2 == 0 && g == groups - 1;
            const auto set_nibble = [](uint8_t *byte, bool high, int value) {
                *byte = static_cast<uint8_t>(high ? (*byte & 0x0F) | value << 4 : (*byte & 0xF0) | value);
            };
            const uint16_t d = p.d[static_cast<size_t>(m) * groups + g];
            tile[alone ? r : 16 * (g % 2) + r] = static_cast<uint8_t>(d >> 8);
            if (alone) {
                set_nibble(tile + 16 + r / 2, r % 2 == 1, d >> 4 & 15);
            } else {
                set_nibble(tile + 32 + r, g % 2 == 1, d >> 4 & 15);
            }
            uint8_t *codes = tile + (alone ? 32 : 64 + 512 * (g % 2));
            for (int c = 0; c < 64; c++) {
                const int code = p.codes[static_cast<size_t>(m) * p.k + 64 * g + c];
                set_nibble(codes + c / 8 * 64 + 4 * r + c % 4, c % 8 >= 4, code);
            }
        }
    }
}

/// Result of a kernel, [tokens][rows].
std::vector<float> run_gemm(const kernel &row, const problem &p) {
    guarded<uint8_t> weights(static_cast<size_t>(p.panels) * p.groups() * 544);
    pack_weights(p, weights.data());
    const size_t scales = p.per_group ? p.groups() : 1;
    guarded<int8_t> q(p.q.size());
    guarded<int32_t> bias(static_cast<size_t>(p.tokens) * p.groups());
    guarded<float> scale(p.scale.size());
    const int offset = p.bits == 4 ? row.offset4 : 0;
    for (int t = 0; t < p.tokens; t++) {
        const size_t begin = t / row.nr * row.nr, in = t % row.nr;
        const size_t n = std::min<size_t>(row.nr, p.tokens - begin);
        for (int g = 0; g < p.groups(); g++) {
            int sum = 0;
            for (int k = 64 * g; k < 64 * g + 64; k++) {
                const int8_t x = p.q[static_cast<size_t>(t) * p.k + k];
                q[begin * p.k + (k / row.kr * n + in) * row.kr + k % row.kr] = static_cast<int8_t>(x + offset);
                sum += x;
            }
            bias[begin * p.groups() + g * n + in] = -64 * sum;
        }
        for (size_t i = 0; i < scales; i++) scale[begin * scales + i * n + in] = p.scale[t * scales + i];
    }
    guarded<uint8_t> codebook(16);
    std::memcpy(codebook.data(), p.codebook, 16);

    std::vector<std::unique_ptr<guarded<float>>> outputs;
    guarded<float *> dst(p.tokens);
    for (int t = 0; t < p.tokens; t++) {
        outputs.push_back(std::make_unique<guarded<float>>(p.rows()));
        dst[t] = outputs.back()->data();
    }
    row.gemm({reinterpret_cast<const tile *>(weights.data()), p.k, p.panels, codebook.data(), p.tensor_scale,
              p.per_group, q.data(), bias.data(), scale.data(), p.tokens, dst.data(), p.bits});
    std::vector<float> result;
    for (const auto &output : outputs) {
        CHECK(output->intact(), "%s: gemm wrote outside its rows", row.name);
        result.insert(result.end(), output->data(), output->data() + p.rows());
    }
    return result;
}

/// The product in double, and the permitted error of a binary32 kernel. Integers and their conversion are exact; what
/// remains are three products per group, the additions over the groups in any order, and the two final factors.
void product_by_definition(const problem &p, int t, int m, double *value, double *tolerance) {
    double sum = 0, magnitude = 0;
    for (int g = 0; g < p.groups(); g++) {
        int integer = 0;
        for (int k = 64 * g; k < 64 * g + 64; k++) {
            integer +=
                (p.codebook[p.codes[static_cast<size_t>(m) * p.k + k]] - 64) * p.q[static_cast<size_t>(t) * p.k + k];
        }
        double term = integer * half_value(p.d[static_cast<size_t>(m) * p.groups() + g]);
        term *= p.scale[p.per_group ? static_cast<size_t>(t) * p.groups() + g : t];
        sum += term;
        magnitude += std::fabs(term);
    }
    *value = sum * p.tensor_scale;
    *tolerance = magnitude * p.tensor_scale * (p.groups() + 4) * std::ldexp(1.0, -24);
}

void compare_gemm(const std::vector<const kernel *> &kernels, const problem &p, bool exact) {
    std::vector<double> want, tolerance;
    for (int t = 0; t < p.tokens; t++) {
        for (int m = 0; m < p.rows(); m++) {
            double value, allowed;
            product_by_definition(p, t, m, &value, &allowed);
            want.push_back(value);
            tolerance.push_back(exact ? 0.0 : allowed);
        }
    }
    for (const kernel *row : kernels) {
        const std::vector<float> got = run_gemm(*row, p);
        for (size_t i = 0; i < want.size(); i++) {
            const bool agree = std::isnan(want[i]) ? std::isnan(got[i]) : std::fabs(got[i] - want[i]) <= tolerance[i];
            CHECK(agree, "%s, k %d, %d panels, %d tokens, %d bits, per_group %d: token %d row %d is %.9g, not %.9g",
                  row->name, p.k, p.panels, p.tokens, p.bits, p.per_group, int(i) / p.rows(), int(i) % p.rows(), got[i],
                  want[i]);
            if (!agree) break;
        }
    }
}

/// Uses scales that keep the f32 sums exact, so that equal results mean equal integers. D is 0 or +-1, for at most 16
/// groups of a row, and
/// I
/// <= 64 * 64 * 127 < 2^19, so every partial sum is an integer below 2^23. All activation scales are one power of two.
void test_gemm_exact(const std::vector<const kernel *> &kernels) {
    problem p = random_problem();
    p.tensor_scale = std::ldexp(1.0f, random_int(-20, 20));
    for (int m = 0; m < p.rows(); m++) {
        const int only = chance(2) ? random_int(0, p.groups() - 1) : -1;  // a single group shows its integer unchanged
        int used = 0;
        for (int g = 0; g < p.groups(); g++) {
            uint16_t d = 0;
            if (only < 0 ? used < 16 && chance(2) : g == only) d = chance(2) ? 0x3C00 : 0xBC00, used++;
            p.d[static_cast<size_t>(m) * p.groups() + g] = d;
        }
    }
    for (size_t t = 0, n = p.per_group ? p.groups() : 1; t < p.scale.size() / n; t++) {
        const float scale = std::ldexp(1.0f, random_int(-20, 20));
        for (size_t i = 0; i < n; i++) p.scale[t * n + i] = scale;
    }
    compare_gemm(kernels, p, true);
}

/// Uses any 12-bit scales that the format allows (finite, either sign, also subnormal), and any activation scales.
void test_gemm_general(const std::vector<const kernel *> &kernels) {
    problem p = random_problem();
    p.tensor_scale = std::ldexp(random_float(0.5f, 1.0f), random_int(-8, 2));
    const int low = chance(3) ? 0 : 8, high = chance(3) ? 30 : 14;  // range of the exponent field
    for (uint16_t &d : p.d)
        d = static_cast<uint16_t>(random_int(0, 1) << 15 | random_int(low, high) << 10 | random_int(0, 63) << 4);
    const size_t n = p.per_group ? p.groups() : 1;
    for (float &s : p.scale) s = chance(30) ? 0.0f : std::ldexp(random_float(0.5f, 1.0f), random_int(-10, 2));
    if (chance(5)) {  // a token that held a NaN: q = 0, bias = 0, scale NaN
        const size_t t = random_int(0, p.tokens - 1);
        for (int k = 0; k < p.k; k++) p.q[t * p.k + k] = 0;
        for (size_t i = 0; i < n; i++) p.scale[t * n + i] = std::numeric_limits<float>::quiet_NaN();
    }
    compare_gemm(kernels, p, false);
}

}  // namespace
