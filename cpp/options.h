// Every environment variable of the plugin, read once when it is loaded.
#pragma once

#include <string>

namespace agq {

struct options {
    std::string force_isa;  ///< AGQ_FORCE_ISA: name of the kernel to use, empty for the best one
};

options read_options();

}  // namespace agq
