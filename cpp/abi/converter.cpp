// The entry points that the Python converter needs (agq_gguf/matrix/kernels.py): rounding kernels, without a host.
#include <cstdint>

#include "abi/export.h"
#include "base/environment.h"
#include "kernels/select.h"

namespace {

/// Of the kernel that products run with. A name that this CPU cannot run is an error when a model is loaded; rounding
/// does not depend on it.
const agq::rounding_kernel &rounding() {
    static const agq::kernel *chosen = [] {
        const std::string forced = agq::read_options().force_isa;
        const agq::kernel *found = agq::select_kernel(forced.empty() ? nullptr : forced.c_str(), nullptr);
        return found ? found : &agq::kernel_scalar;
    }();
    return *chosen->rounding;
}

}  // namespace

// Arguments: cpp/kernels/rounding.h. `values` are the 16 of a codebook.

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
