// Measures the machine's peak: integer products of one thread, and reading memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace peak {

#if defined(__x86_64__) && defined(__GNUC__)

// Sixteen independent accumulators hide the latency. Registers are named explicitly, so that this file needs no
// compiler flags: the compiler itself uses neither their upper parts nor registers above 15 here.
#define AGQ_ACCUMULATORS \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
#define AGQ_FOR_12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

/// Number of operations (a product and an addition count as two) in `rounds` rounds of 512-bit VPDPBUSD.
inline double vnni512(long rounds) {
#define AGQ_STEP(i) "vpdpbusd %%zmm16, %%zmm17, %%zmm" #i "\n"
    for (long i = 0; i < rounds; i++) asm volatile(AGQ_FOR_12(AGQ_STEP) AGQ_FOR_12(AGQ_STEP)::: AGQ_ACCUMULATORS);
#undef AGQ_STEP
    asm volatile("vzeroupper");
    return 2.0 * 64 * 24 * static_cast<double>(rounds);
}

/// The same for 256-bit VPDPBUSD, in the AVX-512 or the AVX-VNNI encoding.
inline double vnni256_evex(long rounds) {
#define AGQ_STEP(i) "%{evex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
    for (long i = 0; i < rounds; i++) asm volatile(AGQ_FOR_12(AGQ_STEP) AGQ_FOR_12(AGQ_STEP)::: AGQ_ACCUMULATORS);
#undef AGQ_STEP
    asm volatile("vzeroupper");
    return 2.0 * 32 * 24 * static_cast<double>(rounds);
}

inline double vnni256_vex(long rounds) {
#define AGQ_STEP(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
    for (long i = 0; i < rounds; i++) asm volatile(AGQ_FOR_12(AGQ_STEP) AGQ_FOR_12(AGQ_STEP)::: AGQ_ACCUMULATORS);
#undef AGQ_STEP
    asm volatile("vzeroupper");
    return 2.0 * 32 * 24 * static_cast<double>(rounds);
}

/// The same for the three AVX2 instructions VPMADDUBSW, VPMADDWD, VPADDD.
inline double maddubs(long rounds) {
#define AGQ_STEP(i)                          \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n" \
    "vpmaddwd %%ymm14, %%ymm12, %%ymm12\n"   \
    "vpaddd %%ymm12, %%ymm" #i ", %%ymm" #i "\n"
    for (long i = 0; i < rounds; i++) {
        asm volatile(AGQ_FOR_12(AGQ_STEP) AGQ_FOR_12(AGQ_STEP)::: AGQ_ACCUMULATORS, "xmm12");
    }
#undef AGQ_STEP
    asm volatile("vzeroupper");
    return 2.0 * 32 * 24 * static_cast<double>(rounds);
}
#undef AGQ_FOR_12
#undef AGQ_ACCUMULATORS

#endif

/// Runs a number of rounds of a peak loop; returns the number of operations.
using loop = double (*)(long rounds);

/// The peak loop for a kernel, or null if there is none.
inline loop of_kernel(const std::string &name) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (name == "avx512vnni") return vnni512;
    if (name == "avxvnni") return __builtin_cpu_supports("avx512vnni") ? vnni256_evex : vnni256_vex;
    if (name == "avx2") return maddubs;
#endif
    (void)name;
    return nullptr;
}

/// How many bytes ahead to prefetch into the first-level and the second-level cache; 0: no prefetch.
struct fetch {
    size_t near, far;
};

/// Reads `bytes` (a multiple of 256) once. Returning the result keeps the compiler from removing the reads.
inline uint64_t read(const char *memory, size_t bytes, fetch ahead) {
    uint64_t sums[8] = {0};
    for (size_t i = 0; i < bytes; i += 256) {
        for (size_t line = 0; line < 256; line += 64) {
#if defined(__GNUC__)
            if (ahead.near > 0) __builtin_prefetch(memory + i + line + ahead.near);
            if (ahead.far > 0) __builtin_prefetch(memory + i + line + ahead.far, 0, 2);
#endif
            uint64_t words[8];
            std::memcpy(words, memory + i + line, 64);
            for (int j = 0; j < 8; j++) sums[j] += words[j];
        }
    }
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    return sum;
}

}  // namespace peak
