// Packs tokens for the Q8_0 kernels, for all instruction sets: loops that compilers vectorize.
//
// Everything but q8_pack is in an anonymous namespace: this file is compiled for several instruction sets, and the
// linker must not merge the copies. For the same reason it uses no template or inline function of the standard library.
#include <cstring>
#include <limits>

#include "kernels/isa.h"

namespace agq {
namespace {

/// Packs 32 columns.
void pack_block(const float *x, uint8_t *q, float (&scale)[8]) {
    constexpr int32_t infinity = 0x7F800000;
    int32_t worst = 0;  // of the bits without sign: their order is that of the magnitudes, NaN above all
    for (int i = 0; i < q8_columns; i++) {
        int32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7FFFFFFF;
        worst = bits > worst ? bits : worst;
    }
    float amax;
    std::memcpy(&amax, &worst, sizeof amax);
    // Smaller values than 2^-100 count as zero: the reciprocal must be finite.
    const bool empty = amax < 7.8886091e-31f, good = worst < infinity;
    const float factor = good && !empty ? 127.0f / amax : 0.0f;
    const float unit = !good ? std::numeric_limits<float>::quiet_NaN() : empty ? 0.0f : amax / 127.0f;
    for (float &s : scale) s = unit;
    for (int i = 0; i < q8_columns; i++) {
        // 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits of the sum.
        const float product = x[i] * factor;
        const float shifted = (good ? product : 0.0f) + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        q[i] = static_cast<uint8_t>(bits + 128);
    }
}

}  // namespace

namespace isa::AGQ_ISA {

void q8_pack(const float *x, int64_t k, q8_group *to) {
    for (int64_t i = 0; i < k; i += 2 * q8_columns, to++) {
        for (int b = 0; b < 2; b++) pack_block(x + i + b * q8_columns, to->q + b * q8_columns, to->scale[b]);
    }
}

}  // namespace isa::AGQ_ISA
}  // namespace agq
