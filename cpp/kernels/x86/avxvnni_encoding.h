// How inline assembly writes the instructions of AVX-VNNI, such as AGQ_AVXVNNI "vpdpbusd %2, %1, %0". It has three
// reasons: GCC 12 copies the accumulators of the intrinsics from register to register, older compilers lack the
// intrinsics, and we choose the encoding.
//
// Built with AGQ_AVXVNNI_AS_EVEX, the kernels use the EVEX encoding of the same instructions. A CPU with AVX-512 VNNI
// but without AVX-VNNI can then run their tests. The rest of the machine code is the same.
#pragma once

#ifdef AGQ_AVXVNNI_AS_EVEX
#define AGQ_AVXVNNI "%{evex%} "
#else
#define AGQ_AVXVNNI "%{vex%} "
#endif
