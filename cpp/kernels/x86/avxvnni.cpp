// AVX-VNNI: VPDPBUSD on 256-bit registers in its VEX encoding, for CPUs without AVX-512.
#include "kernels/x86/avxvnni_encoding.h"
#include "kernels/x86/q8_256.h"
#include "kernels/x86/x86_256.h"
#include "kernels/x86/x86_cpu.h"

namespace agq {

AGQ_DECLARE_ISA(avx2)

namespace {

struct dot4 {
    static __m256i start(int32_t bias) { return _mm256_set1_epi32(bias); }
    static void step(__m256i &rows0, __m256i &rows8, columns4 u, const int8_t *x) {
        const __m256i four = broadcast(x);
        rows0 = dot(rows0, u.rows0, four);
        rows8 = dot(rows8, u.rows8, four);
    }
    static __m256i dot(__m256i sum, __m256i u, __m256i x) {
#if defined(__GNUC__)
        asm(AGQ_AVXVNNI "vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(x));
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
                               AGQ_ATTENTION(isa::avxvnni::attention),
                               4,
                               0,
                               &isa::avx2::rows,
                               &isa::avx2::rounding,
                               &q8};

}  // namespace agq
