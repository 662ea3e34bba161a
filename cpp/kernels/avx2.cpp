// AVX2: VPMADDUBSW multiplies unsigned codebook bytes with signed activations and adds neighbours in 16 bits.
//
// Codebook bytes are at most 127 and activations at most 127 in size, so a pair adds up to at most 2 * 127 * 127 =
// 32258: nothing saturates, and no trick with signs is needed.
#include "x86_256.h"
#include "x86_cpu.h"

namespace agq {
namespace {

inline __m256i add_pairs(__m256i sums16) {
    return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1));
}

/// For any activations: each step widens to 32 bits.
struct widen_each_step {
    static __m256i start(int32_t bias) { return _mm256_set1_epi32(bias); }
    static __m256i step(__m256i sum, __m256i u, __m256i x) {
        return _mm256_add_epi32(sum, add_pairs(_mm256_maddubs_epi16(u, x)));
    }
    static __m256i finish(__m256i sum, int32_t) { return sum; }
};

/// For 4-bit activations: the 16 steps of a group add up to at most 16 * 2 * 127 * 7 = 28448, so 16 bits are enough for
/// the whole group and a step costs two instructions instead of three.
struct widen_each_group {
    static __m256i start(int32_t) { return _mm256_setzero_si256(); }
    static __m256i step(__m256i sum, __m256i u, __m256i x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, x)); }
    static __m256i finish(__m256i sum, int32_t bias) {
        return _mm256_add_epi32(_mm256_set1_epi32(bias), add_pairs(sum));
    }
};

void gemm(const gemm_args &args) {
    if (args.bits == 4) {
        multiply<widen_each_group>(args);
    } else {
        multiply<widen_each_step>(args);
    }
}

bool supported() {
    return detect_x86().avx2;
}

}  // namespace

const kernel kernel_avx2 = {
    "avx2", supported, nr, 1, quantize_block<quantize_ops>, gemm, AGQ_ATTENTION(attention_avx2)};

}  // namespace agq
