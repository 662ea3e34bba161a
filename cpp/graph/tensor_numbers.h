// The numbers of a graph's tensors. A flat table, since a graph of a few hundred nodes is read for every new prompt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "host/host.h"

namespace agq {

class tensor_numbers {
  public:
    /// The number of a tensor, or -1.
    int find(const ggml_tensor *t) const { return slots_.empty() ? -1 : slots_[slot_of(t)].number; }
    /// Gives a tensor this number unless it has one. Returns its number, and whether it is new. Throws std::bad_alloc.
    std::pair<int, bool> add(const ggml_tensor *t, int number) {
        if (2 * (n_ + 1) > slots_.size()) grow(4 * (n_ + 1));
        entry &e = slots_[slot_of(t)];
        if (e.tensor) return {e.number, false};
        e = {t, number};
        ++n_;
        return {number, true};
    }
    /// Makes room for this many. Throws std::bad_alloc.
    void reserve(size_t n) {
        if (2 * n > slots_.size()) grow(2 * n);
    }

  private:
    struct entry {
        const ggml_tensor *tensor = nullptr;
        int number = -1;
    };

    /// Where a tensor is, or where it would come.
    size_t slot_of(const ggml_tensor *t) const {
        const uint64_t hash = reinterpret_cast<uintptr_t>(t) * uint64_t{0x9E3779B97F4A7C15};
        size_t slot = static_cast<size_t>(hash >> shift_);
        while (slots_[slot].tensor && slots_[slot].tensor != t) slot = (slot + 1) & (slots_.size() - 1);
        return slot;
    }
    void grow(size_t least) {
        size_t size = 2;
        for (shift_ = 63; size < least; --shift_) size *= 2;
        std::vector<entry> old(size);
        old.swap(slots_);
        for (const entry &e : old) {
            if (e.tensor) slots_[slot_of(e.tensor)] = e;
        }
    }

    std::vector<entry> slots_;  ///< a power of two; at least half of them are free
    size_t n_ = 0;
    int shift_ = 64;
};

}  // namespace agq
