// How much memory the process may still take.
#pragma once

#include <cstdint>

namespace agq {

struct memory_state {
    uint64_t available = 0;  ///< bytes that can be allocated before anything is swapped out or ended; 0: not known
    uint64_t total = 0;      ///< bytes of the machine, or of the control group if that has less
};

/// Reads the machine's memory and the limits of the process's control groups (containers). Linux only.
memory_state read_memory_state();

}  // namespace agq
