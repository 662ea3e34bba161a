// A function of a custom node.
#pragma once

#include "host/host.h"

namespace agq {

struct custom_node {
    ggml_custom_op run;
    bool has_output;  ///< whether it writes to dst->data; otherwise it prepares data for a later node
};

}  // namespace agq
