// A kernel's sums are arrays. They stay in registers only if the loops over them are unrolled early, and if functions
// that take them are inlined.
//
// Functions that only prefetch must be inlined, too: GCC 12 takes them for functions without any effect, and removes a
// call that it has not inlined early.
#pragma once

#if defined(__clang__)
#define AGQ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define AGQ_UNROLL _Pragma("GCC unroll 16")
#else
#define AGQ_UNROLL
#endif

// In front of an inner loop: GCC 12 would unroll it first, and then not turn it into one vector operation.
#if defined(__GNUC__) && !defined(__clang__)
#define AGQ_ROLLED _Pragma("GCC unroll 1")
#else
#define AGQ_ROLLED
#endif

#if defined(__GNUC__)
#define AGQ_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define AGQ_INLINE __forceinline
#else
#define AGQ_INLINE inline
#endif
