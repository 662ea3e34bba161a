// The entry points that the Python converter calls (agq_gguf/matrix/kernels.py): the rounding kernels. They need no
// host.
#include <cstdint>

#include "abi/export.h"
#include "base/environment.h"
#include "kernels/select.h"

namespace {

/// The rounding functions of the kernel that runs the products. If AGQ_FORCE_ISA names a kernel that this CPU cannot
/// run, loading a model fails; rounding still works.
const agq::rounding_kernel &rounding() {
    static const agq::kernel *chosen = [] {
        const std::string forced = agq::read_options().force_isa;
        const agq::kernel *found = agq::select_kernel(forced.empty() ? nullptr : forced.c_str(), nullptr);
        return found ? found : &agq::kernel_scalar;
    }();
    return *chosen->rounding;
}

}  // namespace

// Arguments: cpp/kernels/rounding.h. `values` holds the 16 values of a codebook.

AGQ_EXPORT void agq_search_scales(const float *values, const float *weights, const float *h, int32_t h_each, int64_t n,
                                  float *scales) {
    rounding().search_scales(values, weights, h, h_each != 0, n, scales);
}

AGQ_EXPORT void agq_feed_back(const float *values, const float *upper, const float *weights, int64_t n, uint8_t *codes,
                              float *scales, float *errors) {
    rounding().feed_back(values, upper, weights, n, codes, scales, errors);
}

AGQ_EXPORT void agq_descend(const float *values, const float *inside, const float *slope, int64_t n, uint8_t *codes,
                            float *scales, float *change) {
    rounding().descend(values, inside, slope, n, codes, scales, change);
}

AGQ_EXPORT void agq_subtract_product(const float *left, int64_t stride, const float *right, int64_t k, int64_t n,
                                     float *out) {
    rounding().subtract_product(left, stride, right, k, n, out);
}

// Arguments: the grid, then those of rounding.h.

AGQ_EXPORT void agq_feed_back_on_grid(int64_t columns, int64_t n, const float *steps, const float *offsets,
                                      int32_t most, const float *upper, const float *weights, uint8_t *codes,
                                      float *errors) {
    rounding().feed_back_on_grid({columns, n, steps, offsets, most}, upper, weights, codes, errors);
}

AGQ_EXPORT void agq_descend_on_grid(int64_t columns, int64_t n, const float *steps, const float *offsets, int32_t most,
                                    const float *inside, const float *slope, uint8_t *codes, float *change) {
    rounding().descend_on_grid({columns, n, steps, offsets, most}, inside, slope, codes, change);
}
