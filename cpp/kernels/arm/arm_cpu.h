// Internal to the Arm kernels: detects CPU features. Every 64-bit Arm has plain NEON.
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

namespace agq {
namespace {

struct arm_features {
    bool dotprod;  ///< FEAT_DotProd: SDOT
    bool i8mm;     ///< FEAT_I8MM: SMMLA
};

#if defined(__linux__)

inline arm_features detect_arm() {
    // Bit numbers from the Linux kernel's interface; older C libraries do not name them.
    constexpr unsigned long asimddp = 1ul << 20;  // HWCAP_ASIMDDP
    constexpr unsigned long i8mm = 1ul << 13;     // HWCAP2_I8MM
    return {(getauxval(AT_HWCAP) & asimddp) != 0, (getauxval(AT_HWCAP2) & i8mm) != 0};
}

#elif defined(__APPLE__)

inline bool reported(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
inline arm_features detect_arm() {
    return {reported("hw.optional.arm.FEAT_DotProd"), reported("hw.optional.arm.FEAT_I8MM")};
}

#elif defined(_WIN32)

inline arm_features detect_arm() {
    constexpr DWORD dotprod = 43;  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
    constexpr DWORD i8mm = 66;     // PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE, since Windows 11 24H2
    return {IsProcessorFeaturePresent(dotprod) != 0, IsProcessorFeaturePresent(i8mm) != 0};
}

#else

inline arm_features detect_arm() {
    return {false, false};  // no known way to ask here: use plain NEON
}

#endif

}  // namespace
}  // namespace agq
