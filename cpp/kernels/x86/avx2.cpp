// AVX2: VPMADDUBSW multiplies unsigned codebook bytes by signed activations and adds adjacent products in 16 bits.
//
// Codebook bytes are at most 127, and activations at most 127 in size. So a pair adds up to at most 2 * 127 * 127 =
// 32258: nothing saturates, and no sign trick is needed.
#include "kernels/x86/avx2_4bit.h"
#include "kernels/x86/q8_256.h"
#include "kernels/x86/x86_256.h"
#include "kernels/x86/x86_cpu.h"

namespace agq {
namespace {

inline __m256i add_pairs(__m256i sums16) {
    return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1));
}

// The steps are inline assembly. GCC computes the products of all tokens before it adds the first, and then has to keep
// the sums in memory: 12 sums, two codebook operands and these two temporaries fill all 16 registers.
#ifdef __GNUC__
alignas(32) constexpr int16_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
#endif

/// For any activations: each step widens to 32 bits.
struct widen_each_step {
    static __m256i start(int32_t bias) { return _mm256_set1_epi32(bias); }
    static void step(__m256i &rows0, __m256i &rows8, columns4 u, const int8_t *x) {
#ifdef __GNUC__
        __m256i a, b;
        asm("vpbroadcastd %[x], %[b]\n\t"
            "vpmaddubsw %[b], %[u0], %[a]\n\t"
            "vpmaddubsw %[b], %[u8], %[b]\n\t"
            "vpmaddwd %[ones], %[a], %[a]\n\t"
            "vpmaddwd %[ones], %[b], %[b]\n\t"
            "vpaddd %[a], %[rows0], %[rows0]\n\t"
            "vpaddd %[b], %[rows8], %[rows8]"
            : [rows0] "+x"(rows0), [rows8] "+x"(rows8), [a] "=&x"(a), [b] "=&x"(b)
            :
            [u0] "x"(u.rows0), [u8] "x"(u.rows8), [ones] "m"(ones), [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
#else
        const __m256i four = broadcast(x);
        rows0 = _mm256_add_epi32(rows0, add_pairs(_mm256_maddubs_epi16(u.rows0, four)));
        rows8 = _mm256_add_epi32(rows8, add_pairs(_mm256_maddubs_epi16(u.rows8, four)));
#endif
    }
    static __m256i finish(__m256i sum, int32_t) { return sum; }
};

/// For 4-bit activations of few tokens (avx2_4bit.h is for many). The 16 steps of a group add up to at most 16 * 2 *
/// 127 * 7 = 28448. So 16 bits are enough for a whole group, and a step takes two instructions instead of three.
struct widen_each_group {
    static __m256i start(int32_t) { return _mm256_setzero_si256(); }
    static void step(__m256i &rows0, __m256i &rows8, columns4 u, const int8_t *x) {
        const __m256i four = _mm256_sub_epi8(broadcast(x), _mm256_set1_epi8(activation_offset));
        rows0 = _mm256_add_epi16(rows0, _mm256_maddubs_epi16(u.rows0, four));
        rows8 = _mm256_add_epi16(rows8, _mm256_maddubs_epi16(u.rows8, four));
    }
    static __m256i finish(__m256i sum, int32_t bias) {
        return _mm256_add_epi32(_mm256_set1_epi32(bias), add_pairs(sum));
    }
};

void gemm(const gemm_args &args) {
    if (args.bits == 4) {
        if (args.n_tokens > nr) {
            multiply_4bit(args);
        } else {
            multiply<widen_each_group>(args);
        }
    } else {
        multiply<widen_each_step>(args);
    }
}

/// Blocks of Q8_0: without VNNI, VPMADDWD multiplies 16-bit numbers, so bytes are widened.
struct q8_dot {
    struct weights {
        __m256i first, second;
    };
    using tokens = weights;

    static weights load_weights(const uint8_t *bytes) {
        return {_mm256_cvtepi8_epi16(half(bytes)), _mm256_cvtepi8_epi16(half(bytes + 16))};
    }
    static tokens load_tokens(const uint8_t *q) {
        const __m256i offset = _mm256_set1_epi16(128);
        return {_mm256_sub_epi16(_mm256_cvtepu8_epi16(half(q)), offset),
                _mm256_sub_epi16(_mm256_cvtepu8_epi16(half(q + 16)), offset)};
    }
    static __m256i dot(weights w, tokens x) {
        return _mm256_add_epi32(_mm256_madd_epi16(w.first, x.first), _mm256_madd_epi16(w.second, x.second));
    }

  private:
    static __m128i half(const uint8_t *bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)); }
};

constexpr q8_kernel q8 = {isa::avx2::q8_pack, q8_multiply<q8_tiles<q8_dot>>};

bool supported() {
    return detect_x86().avx2;
}

}  // namespace

const kernel kernel_avx2 = {"avx2",
                            supported,
                            nr,
                            1,
                            quantize_block<quantize_ops<activation_offset>, 4, activation_offset>,
                            gemm,
                            AGQ_ATTENTION(isa::avx2::attention),
                            4,
                            activation_offset,
                            &isa::avx2::rows,
                            &isa::avx2::rounding,
                            &q8};

}  // namespace agq
