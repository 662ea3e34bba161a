// A program in which memory runs out when a test says so.
#pragma once

#include <new>

extern int allocations_left;  ///< until memory runs out; negative: it never does

/// Does some work with memory for so many allocations; whether it sufficed. The caller may do the same again, or go on
/// with other work.
template <typename Work>
bool with_little_memory(int allocations, const Work &work) {
    allocations_left = allocations;
    bool sufficed = true;
    try {
        work();
    } catch (const std::bad_alloc &) {
        sufficed = false;
    }
    allocations_left = -1;
    return sufficed;
}
