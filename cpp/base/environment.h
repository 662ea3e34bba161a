// Every environment variable of the plugin; read once when it is loaded, if nothing else is said.
#pragma once

#include <string>

namespace agq {

struct options {
    bool fuse = true;       ///< AGQ_FUSE=0: leave the work between products to the host, for comparisons
    bool take_all = false;  ///< AGQ_TAKE_ALL=1: take every operation, without waiting for an AGQ4 tensor, for tests
    std::string force_isa;  ///< AGQ_FORCE_ISA: name of the kernel to use, empty for the best one
};

options read_options();

// As they are now: they are read when a context is created. Empty if they are not set.
std::string prune_option();            ///< AGQ_PRUNE
std::string activation_bits_option();  ///< AGQ_ACT_BITS
std::string attention_option();        ///< AGQ_ATTENTION

}  // namespace agq
