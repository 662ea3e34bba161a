// Asks the processor for memory that is read soon. Kernels have their own ways.
#pragma once

namespace agq {

inline void prefetch(const void *address) {
#ifdef __GNUC__
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

}  // namespace agq
