// What the files of portable/ define for each instruction set. CMake compiles them once per set, with AGQ_ISA as its
// name (cmake/kernels.cmake). A kernel uses its own set's functions, or those of `generic`, which run everywhere.
#pragma once

#include "kernels/attention.h"
#include "kernels/attention_few.h"
#include "kernels/q8.h"
#include "kernels/rounding.h"
#include "kernels/rows.h"
#include "kernels/softmax_weights.h"

namespace agq {

#define AGQ_DECLARE_ISA(name)                               \
    namespace isa::name {                                   \
    extern const row_kernel rows;                           \
    extern const rounding_kernel rounding;                  \
    extern const attention_kernel attention;                \
    extern const few_kernel few;                            \
    extern const q8_kernel q8;                              \
    void q8_pack(const float *x, int64_t k, q8_group *to);  \
    void softmax_weights(const softmax_weights_args &args); \
    }

AGQ_DECLARE_ISA(generic)
#ifdef AGQ_ISA
AGQ_DECLARE_ISA(AGQ_ISA)
#endif

}  // namespace agq
