// The intrinsics of AVX-512, without the warnings of the compiler's own headers.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12's headers initialize many variables with themselves in intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
