// AVX-VNNI: VPDPBUSD on 256-bit registers in its VEX encoding, for CPUs without AVX-512.
//
// Built with AGQ_AVXVNNI_AS_EVEX, the kernel uses the EVEX encoding of the same instruction. A CPU with AVX-512 VNNI
// but without AVX-VNNI can then run its tests. The rest of the machine code is the same.
#include "kernels/x86/q8_256.h"
#include "kernels/x86/x86_256.h"
#include "kernels/x86/x86_cpu.h"

namespace agq {
namespace {

#ifdef AGQ_AVXVNNI_AS_EVEX
#define AGQ_VPDPBUSD "%{evex%} vpdpbusd %2, %1, %0"
#else
#define AGQ_VPDPBUSD "%{vex%} vpdpbusd %2, %1, %0"
#endif

struct dot4 {
    static __m256i start(int32_t bias) { return _mm256_set1_epi32(bias); }
    static void step(__m256i &rows0, __m256i &rows8, columns4 u, const int8_t *x) {
        const __m256i four = broadcast(x);
        rows0 = dot(rows0, u.rows0, four);
        rows8 = dot(rows8, u.rows8, four);
    }
    static __m256i dot(__m256i sum, __m256i u, __m256i x) {
#if defined(__GNUC__)
        // Inline assembly for three reasons: GCC 12 copies the accumulators of the intrinsic from register to register,
        // older compilers lack the intrinsic, and we choose the encoding.
        asm(AGQ_VPDPBUSD : "+x"(sum) : "x"(u), "x"(x));
        return sum;
#else
        return _mm256_dpbusd_avx_epi32(sum, u, x);
#endif
    }
    static __m256i finish(__m256i sum, int32_t) { return sum; }
};

/// Blocks of Q8_0: 128 times the sum of the weights is subtracted beforehand.
struct q8_dot {
    struct weights {
        __m256i w, start;
    };
    using tokens = __m256i;

    static weights load_weights(const uint8_t *bytes) {
        const __m256i w = load(bytes), zero = _mm256_setzero_si256();
        return {w, _mm256_sub_epi32(zero, dot4::dot(zero, _mm256_set1_epi8(-128), w))};
    }
    static tokens load_tokens(const uint8_t *q) { return load(q); }
    static __m256i dot(weights w, tokens x) { return dot4::dot(w.start, x, w.w); }
};

constexpr q8_kernel q8 = {isa::avx2::q8_pack, q8_multiply<q8_tiles<q8_dot>>};

bool supported() {
#ifdef AGQ_AVXVNNI_AS_EVEX
    return detect_x86().avx512vnni;
#else
    return detect_x86().avxvnni;
#endif
}

}  // namespace

const kernel kernel_avxvnni = {"avxvnni",
                               supported,
                               nr,
                               1,
                               quantize_block<quantize_ops<0>>,
                               multiply<dot4>,
                               AGQ_ATTENTION(isa::avx2::attention),
                               4,
                               0,
                               &isa::avx2::rows,
                               &isa::avx2::rounding,
                               &q8};

}  // namespace agq
