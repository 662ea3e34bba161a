// Internal to the attention kernels of x86 with 16-bit integers: layout of packed keys and values, and how operands are
// scaled.
//
// A query or key vector is converted to integers with one scale, so that its Euclidean norm stays below 46000. 46000^2
// is below 2^31, so by the Cauchy-Schwarz inequality all products fit 32 bits. A vector of 64 normally distributed
// channels keeps 14 bits. A value vector keeps 14 bits of its largest element, with one scale, too. Keys and values in
// the cache have 11 bits. No scale depends on other tokens, so a result does not depend on what its query does not see.
//
// The weights of a row with the 64 keys of a block are multiplied with the scales of the values. Relative to the
// largest of these products, they become integers whose sum is at most 131000. Values are at most 16383, and 131000 *
// 16383 is below 2^31.
//
// Everything is in an anonymous namespace, because each file that includes this is compiled with its own flags.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/attention.h"
#include "kernels/portable/unroll.h"

namespace agq {
namespace {

constexpr float norm_limit = 46000.0f, element_limit = 32767.0f;
constexpr float value_limit = 16383.0f;
constexpr float weight_limit = 32767.0f, weight_sum_limit = 131000.0f;
constexpr float log2_e = 1.44269504f;

/// A polynomial for 2^x, |x| <= 1/2, to 2.6e-6; the highest power first.
constexpr float power_coefficients[] = {9.570101878e-3f, 5.591786178e-2f, 2.402474484e-1f, 6.931218146e-1f,
                                        9.999992614e-1f};

/// Begins a packed block. Then follow int16: of keys [head_qk / 2, rounded up][64 keys][2 channels], of values [32
/// pairs of keys][head_v][2 keys].
struct block_header {
    float scale[attention_keys];
    uint64_t bad;  ///< bit i: the vector of key i is not finite, and stored as zeros
    char filler[56];
};

constexpr size_t round_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

int channel_pairs(int head_qk) {
    return (head_qk + 1) / 2;
}

size_t key_bytes(int head_qk) {
    return sizeof(block_header) + static_cast<size_t>(channel_pairs(head_qk)) * attention_keys * 4;
}

size_t value_bytes(int head_v) {
    return sizeof(block_header) + static_cast<size_t>(head_v) * 2 * attention_keys;
}

/// Writes n floats as 16-bit integers, padded to `pairs` pairs, and returns their scale. If a float is not finite,
/// returns NaN and writes zeros.
float quantize_vector(const float *x, int n, int pairs, int16_t *to);  // each instruction set has its own

void pack_keys(const float *rows, int n, int head_qk, void *packed) {
    block_header *header = static_cast<block_header *>(packed);
    int32_t *to = reinterpret_cast<int32_t *>(header + 1);
    const int pairs = channel_pairs(head_qk);
    std::memset(header, 0, sizeof(*header));
    if (n < attention_keys) std::memset(to, 0, static_cast<size_t>(pairs) * attention_keys * 4);
    alignas(64) int32_t key[attention_head_limit / 2];
    for (int i = 0; i < n; ++i) {
        const float *x = rows + static_cast<int64_t>(i) * head_qk;
        const float scale = quantize_vector(x, head_qk, pairs, reinterpret_cast<int16_t *>(key));
        if (std::isnan(scale)) {
            header->bad |= uint64_t{1} << i;
        } else {
            header->scale[i] = scale;
        }
        for (int d = 0; d < pairs; ++d) to[d * attention_keys + i] = key[d];
    }
}

/// Marks rows that see a key that is not finite, or whose value is not: those of the bits in `keys`.
void mark_bad(const attention_args &args, const float *masks, unsigned char *bad, uint64_t keys) {
    for (int r = 0; r < args.n_tokens * args.group; ++r) {
        const float *mask = masks + r / args.group * attention_keys;
        for (int i = 0; i < attention_keys; ++i) {
            if ((keys >> i & 1) && mask[i] != -INFINITY) bad[r] = 1;
        }
    }
}

/// Gives out parts of a kernel's scratch memory, each aligned to 64 bytes.
class scratch_parts {
  public:
    explicit scratch_parts(void *scratch) : base_(static_cast<char *>(scratch)), next_(base_) {}
    template <typename T>
    T *take(size_t n) {
        T *at = reinterpret_cast<T *>(next_);
        next_ += round_up(n * sizeof(T));
        return at;
    }
    size_t bytes() const { return static_cast<size_t>(next_ - base_); }

  private:
    char *base_, *next_;
};

/// What the kernels keep of each row of a call.
struct common_rows {
    int32_t *q;          ///< [rows][channel_pairs] pairs of int16
    float *out;          ///< [rows][head_v]
    float *masks;        ///< [tokens][64] masks of a block
    float *sum;          ///< [rows] of the weights; this and the next two are read in whole registers
    float *q_scale;      ///< [rows], with log2 e
    float *maximum;      ///< [rows] largest score so far, in powers of two
    unsigned char *bad;  ///< [rows] whether the row has met a value that is not finite

    common_rows(scratch_parts &parts, int head_qk, int head_v) {
        constexpr size_t rows = attention_row_limit;
        q = parts.take<int32_t>(rows * static_cast<size_t>(channel_pairs(head_qk)));
        out = parts.take<float>(rows * static_cast<size_t>(head_v));
        masks = parts.take<float>(rows * attention_keys);
        sum = parts.take<float>(rows + 16);
        q_scale = parts.take<float>(rows + 16);
        maximum = parts.take<float>(rows + 16);
        bad = parts.take<unsigned char>(rows);
    }

    /// Before the first block of keys.
    void start(const attention_args &args) const {
        const int rows = args.n_tokens * args.group, pairs = channel_pairs(args.head_qk);
        std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(args.head_v));
        for (int r = 0; r < rows; ++r) {
            const float *x = args.q + static_cast<int64_t>(r) * args.head_qk;
            const float sink = args.sinks ? args.sinks[r % args.group] : -INFINITY;
            const float scale = quantize_vector(x, args.head_qk, pairs,
                                                reinterpret_cast<int16_t *>(q + static_cast<int64_t>(r) * pairs));
            bad[r] = std::isnan(scale) || std::isnan(sink);
            q_scale[r] = std::isnan(scale) ? 0.0f : scale * log2_e;
            maximum[r] = sink * log2_e;
            sum[r] = args.sinks ? 1.0f : 0.0f;
        }
    }

    /// What a row's output is multiplied with after the last block.
    float inverse(int r) const {
        // A score beyond binary32 leaves an infinite maximum.
        if (bad[r] || maximum[r] == INFINITY) return NAN;
        return sum[r] == 0 ? 0.0f : 1.0f / sum[r];
    }
};

struct maximum_of {
    static __m256 of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
};
struct total_of {
    static __m256 of(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
};

/// The maximum or total of each of eight registers, in lanes 0 to 7.
template <class operation>
inline __m256 reduce_rows(const __m256 (&x)[8]) {
    // Transposed in 128-bit lanes, pair by pair.
    __m256 pair[4], quad[2];
    AGQ_UNROLL
    for (int i = 0; i < 4; ++i) {
        pair[i] = operation::of(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
    AGQ_UNROLL
    for (int i = 0; i < 2; ++i) {
        quad[i] = operation::of(_mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0x44),
                                _mm256_shuffle_ps(pair[2 * i], pair[2 * i + 1], 0xEE));
    }
    return operation::of(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                         _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

}  // namespace
}  // namespace agq
