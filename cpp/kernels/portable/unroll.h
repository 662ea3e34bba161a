// Sums of a kernel are arrays: only when the loops over them are unrolled early do they become registers.
#pragma once

#if defined(__clang__)
#define AGQ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define AGQ_UNROLL _Pragma("GCC unroll 16")
#else
#define AGQ_UNROLL
#endif
