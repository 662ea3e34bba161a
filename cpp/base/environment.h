// Every environment variable of the plugin. Nothing else reads the environment.
#pragma once

#include <string>

namespace agq {

struct options {
    bool fuse = true;       ///< AGQ_FUSE=0: leave the work between products to the host, for comparisons
    bool take_all = false;  ///< AGQ_TAKE_ALL=1: take every operation, without waiting for an AGQ4 tensor, for tests
    std::string force_isa;  ///< AGQ_FORCE_ISA: name of the kernel to use, empty for the best one
};

/// Reads these three. The plugin does so once, when it is loaded; the converter, before it first rounds weights.
options read_options();

/// The options that are read whenever a context is created.
enum class context_option { prune, activation_bits, attention, isa };

/// What this thread has set, else what the environment says now; empty if neither does.
std::string read_context_option(context_option which);

/// What contexts that this thread creates from now on get in place of the variable; null: back to the variable.
void set_context_option(context_option which, const char *text);

}  // namespace agq
