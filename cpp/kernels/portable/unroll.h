// A kernel's sums are arrays. They stay in registers only if the loops over them are unrolled early, and if functions
// that take them are inlined.
#pragma once

#include "base/inlined.h"

#if defined(__clang__)
#define AGQ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define AGQ_UNROLL _Pragma("GCC unroll 16")
#else
#define AGQ_UNROLL
#endif
