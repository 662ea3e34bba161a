// Functions that must be inlined.
//
// Those that only prefetch are among them: GCC 12 takes them for functions without any effect, and removes a call that
// it has not inlined early.
#pragma once

#if defined(__GNUC__)
#define AGQ_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define AGQ_INLINE __forceinline
#else
#define AGQ_INLINE inline
#endif
