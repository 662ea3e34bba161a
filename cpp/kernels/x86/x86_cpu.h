// Internal to the x86 kernels: detects what the CPU offers and the operating system has enabled.
//
// CPUID is read directly instead of with __builtin_cpu_supports. The feature names of that function differ between
// compilers and versions ("f16c" and "avxvnni" in particular), and MSVC does not have it.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace agq {
namespace {

struct x86_features {
    bool avx2;        ///< AVX2, FMA and F16C
    bool avxvnni;     ///< the above and the VEX-encoded VPDPBUSD and VPDPWSSD
    bool avx512vnni;  ///< the above (except avxvnni) and AVX512F, BW, VL and VNNI
};

struct cpuid_result {
    uint32_t eax, ebx, ecx, edx;
};

#if defined(_MSC_VER) && !defined(__clang__)
inline cpuid_result cpuid(uint32_t leaf, uint32_t subleaf) {
    int r[4];
    __cpuidex(r, static_cast<int>(leaf), static_cast<int>(subleaf));
    return {static_cast<uint32_t>(r[0]), static_cast<uint32_t>(r[1]), static_cast<uint32_t>(r[2]),
            static_cast<uint32_t>(r[3])};
}
inline uint64_t enabled_states() {
    return _xgetbv(0);
}
#else
inline cpuid_result cpuid(uint32_t leaf, uint32_t subleaf) {
    cpuid_result r;
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}
inline uint64_t enabled_states() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}
#endif

inline bool bit(uint64_t word, int position) {
    return (word >> position & 1) != 0;
}

inline x86_features detect_x86() {
    x86_features found = {false, false, false};
    if (cpuid(0, 0).eax < 7) return found;
    const cpuid_result leaf1 = cpuid(1, 0);
    const cpuid_result leaf7 = cpuid(7, 0);
    if (!bit(leaf1.ecx, 27)) return found;      // OSXSAVE: XGETBV may be executed
    const uint64_t states = enabled_states();   // bits 1, 2: XMM, YMM; bits 5, 6, 7: mask registers, ZMM
    if ((states & 0x06) != 0x06) return found;  // the system does not save YMM registers
    found.avx2 = bit(leaf1.ecx, 12) && bit(leaf1.ecx, 28) && bit(leaf1.ecx, 29) && bit(leaf7.ebx, 5);
    found.avxvnni = found.avx2 && leaf7.eax >= 1 && bit(cpuid(7, 1).eax, 4);
    found.avx512vnni = found.avx2 && (states & 0xE6) == 0xE6 && bit(leaf7.ebx, 16) && bit(leaf7.ebx, 30) &&
                       bit(leaf7.ebx, 31) && bit(leaf7.ecx, 11);
    return found;
}

}  // namespace
}  // namespace agq
