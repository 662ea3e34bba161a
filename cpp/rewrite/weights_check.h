// Checks of AGQ4 weights before and between uses.
#pragma once

#include <string>

#include "nodes/activation_set.h"

namespace agq {

/// The tensor's name, for messages.
std::string describe(const ggml_tensor *t);

/// Whether the weights are a complete tensor in host memory with a valid shape.
bool check_weights(const ggml_tensor *w, std::string *error);

/// Whether `kept` was parsed from these weights, seen by matrix `i`. The header holds a checksum of the rest, so
/// comparing the headers detects other weights at the same address.
bool is_intact(const ggml_tensor *weights, const tensor_attributes &kept, int64_t i);
/// The same, seen by all matrices.
bool is_intact(const ggml_tensor *weights, const tensor_attributes &kept);

}  // namespace agq
