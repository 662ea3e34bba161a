// Every environment variable of the plugin. Nothing else reads the environment.
#pragma once

#include <cstdint>
#include <string>

namespace agq {

/// What threads do that wait for others.
enum class wait_mode : uint8_t { automatic, spin, sleep };

/// Whether weights are copied from the mapped file into huge pages: if memory is free, whatever is free, or never.
enum class huge_pages_mode : uint8_t { automatic, on, off };

struct options {
    bool fuse = true;       ///< AGQ_FUSE=0: the host computes the work between products, for comparisons
    bool take_all = false;  ///< AGQ_TAKE_ALL=1: take every operation, without waiting for an AGQ4 tensor, for tests
    std::string force_isa;  ///< AGQ_FORCE_ISA: name of the kernel to use, empty for the best one
    wait_mode wait = wait_mode::automatic;  ///< AGQ_WAIT: spin, sleep, or auto: sleep while cores are shared
    huge_pages_mode huge_pages = huge_pages_mode::automatic;  ///< AGQ_HUGE_PAGES: on, off, or auto
    std::string error;                                        ///< why a value is not understood; empty if all are
};

/// Reads these. The plugin calls it once, when it is loaded; the converter calls it before it rounds the first
/// weights.
options read_options();

/// Options that are read each time a context is created.
enum class context_option { prune, activation_bits, attention, isa };

/// The value set by this thread, else the environment variable's current value; empty if neither is set.
std::string read_context_option(context_option which);

/// Overrides the variable for contexts that this thread creates from now on. Null: use the variable again.
void set_context_option(context_option which, const char *text);

}  // namespace agq
