// The row kernels, for all instruction sets: loops that compilers vectorize.
//
// Everything but the table is in an anonymous namespace: this file is compiled for several instruction sets, and the
// linker must not merge the copies. For the same reason it uses no template or inline function of the standard library.
#include <cmath>
#include <cstring>

#include "kernels/isa.h"

namespace agq {
namespace {

constexpr int lanes = 32;  // independent partial sums, to avoid a chain of dependent additions

double sum_of(const double (&parts)[lanes]) {
    double sum = 0;
    for (int i = 0; i < lanes; ++i) sum += parts[i];
    return sum;
}

void add(const float *a, const float *b, int64_t n, float *y) {
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}

void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    double parts[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j) parts[j] += static_cast<double>(x[i + j] * x[i + j]);
    }
    for (; i < n; ++i) parts[0] += static_cast<double>(x[i] * x[i]);
    const float mean = static_cast<float>(sum_of(parts) / static_cast<double>(n));
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

void layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t n, float *y) {
    double parts[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j) parts[j] += static_cast<double>(x[i + j]);
    }
    for (; i < n; ++i) parts[0] += static_cast<double>(x[i]);
    const float mean = static_cast<float>(sum_of(parts)) / static_cast<float>(n);
    std::memset(parts, 0, sizeof(parts));
    for (i = 0; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j) {
            const float centered = x[i + j] - mean;
            parts[j] += static_cast<double>(centered * centered);
        }
    }
    for (; i < n; ++i) {
        const float centered = x[i] - mean;
        parts[0] += static_cast<double>(centered * centered);
    }
    const float variance = static_cast<float>(sum_of(parts) / static_cast<double>(n));
    const float scale = 1.0f / std::sqrt(variance + eps);
    for (i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i];
    // A separate loop: a product and a sum in one expression could be rounded once, while the host rounds twice.
    for (i = 0; bias && i < n; ++i) y[i] += bias[i];
}

void weighted_sum(const float *const *x, const float *const *bias, const float *weights, int count, int64_t n,
                  float *const *terms, float *y) {
    constexpr int part = 512;
    float sum[part], term[part];
    for (int64_t i = 0; i < n; i += part) {
        const int columns = static_cast<int>(n - i < part ? n - i : part);
        for (int e = 0; e < count; ++e) {
            const float *in = x[e] + i;
            const float w = weights[e];
            // Separate loops: a product and a sum in one expression could be rounded once, while the host rounds twice.
            if (bias) {
                const float *b = bias[e] + i;
                for (int j = 0; j < columns; ++j) term[j] = in[j] + b[j];
                in = term;
            }
            float *to = e == 0 ? sum : term;
            for (int j = 0; j < columns; ++j) to[j] = in[j] * w;
            if (terms) std::memcpy(terms[e] + i, to, static_cast<size_t>(columns) * sizeof(float));
            if (e > 0) {
                for (int j = 0; j < columns; ++j) sum[j] += term[j];
            }
        }
        std::memcpy(y + i, sum, static_cast<size_t>(columns) * sizeof(float));
    }
}

/// e^x for x <= 87.
inline float exponential(float x) {
    // 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the sum.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power;
    std::memcpy(&power, &shifted, 4);
    power = static_cast<int32_t>(static_cast<uint32_t>(power) << 23) + 0x3F800000;
    float factor;
    std::memcpy(&factor, &power, 4);
    return p * factor;
}

constexpr int gate_part = 256;  // columns of a gated unit at a time

/// e[j] = e^-x[j] for `count` columns, clamped at e^87 and e^-87; `e` and `x` are different memory, or the first loop
/// would not become vectors. Separate steps, because compilers turn a single loop into branches and two divisions.
void negative_exponentials(const float *x, int count, float *e) {
    for (int j = 0; j < count; ++j) e[j] = -x[j] < -87.0f ? -87.0f : -x[j];
    for (int j = 0; j < count; ++j) e[j] = e[j] > 87.0f ? 87.0f : e[j];
    for (int j = 0; j < count; ++j) e[j] = exponential(e[j]);
}

void swiglu(const float *gate, const float *up, int64_t n, float *y) {
    float e[gate_part];
    for (int64_t i = 0; i < n; i += gate_part) {
        const int count = static_cast<int>(n - i < gate_part ? n - i : gate_part);
        negative_exponentials(gate + i, count, e);
        for (int j = 0; j < count; ++j) y[i + j] = gate[i + j] / (1.0f + e[j]) * up[i + j];
    }
}

void swiglu_oai(const float *gate, const float *up, float alpha, float limit, int64_t n, float *y) {
    float e[gate_part], g[gate_part], u[gate_part], power[gate_part];
    for (int64_t i = 0; i < n; i += gate_part) {
        const int count = static_cast<int>(n - i < gate_part ? n - i : gate_part);
        for (int j = 0; j < count; ++j) g[j] = gate[i + j] > limit ? limit : gate[i + j];
        for (int j = 0; j < count; ++j) u[j] = up[i + j] > limit ? limit : up[i + j];
        for (int j = 0; j < count; ++j) u[j] = u[j] < -limit ? -limit : u[j];
        for (int j = 0; j < count; ++j) power[j] = alpha * g[j];
        negative_exponentials(power, count, e);
        for (int j = 0; j < count; ++j) y[i + j] = g[j] / (1.0f + e[j]) * (u[j] + 1.0f);
    }
}

}  // namespace

namespace isa::AGQ_ISA {

const row_kernel rows = {add, rms_norm, layer_norm, swiglu, swiglu_oai, weighted_sum};

}  // namespace isa::AGQ_ISA
}  // namespace agq
