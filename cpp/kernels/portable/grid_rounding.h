// Rounding on a grid, for the tables of rounding kernels (kernels/rounding.h).
#pragma once

#include "kernels/rounding.h"

namespace agq::isa::AGQ_ISA {

void feed_back_on_grid(const rounding_grid &grid, const float *upper, const float *weights, uint8_t *codes,
                       float *errors);
void descend_on_grid(const rounding_grid &grid, const float *inside, const float *slope, uint8_t *codes, float *change);

}  // namespace agq::isa::AGQ_ISA
