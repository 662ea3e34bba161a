// A hash table whose entries lie side by side: a look-up waits for memory once. For keys that are numbers or addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace agq {

/// Open addressing with linear probing. Pointers to values are valid until the next change.
template <class Key, class Value>
class flat_map {
  public:
    size_t size() const { return n_; }
    /// The value, or null.
    const Value *find(Key key) const {
        if (n_ == 0) return nullptr;
        const entry &found = entries_[slot_of(key)];
        return found.is_used ? &found.value : nullptr;
    }
    Value *find(Key key) { return const_cast<Value *>(std::as_const(*this).find(key)); }
    /// The value and whether it is new; a new one is default. Throws std::bad_alloc.
    std::pair<Value *, bool> add(Key key) {
        if (Value *known = find(key)) return {known, false};
        if (2 * (n_ + 1) > entries_.size()) resize(4 * (n_ + 1));
        entry &fresh = entries_[slot_of(key)];
        fresh.key = key;
        fresh.is_used = true;
        ++n_;
        return {&fresh.value, true};
    }
    void erase(Key key) {
        if (n_ == 0) return;
        const size_t mask = entries_.size() - 1;
        size_t hole = slot_of(key);
        if (!entries_[hole].is_used) return;
        // Entries behind the hole move up if they may stand there.
        for (size_t next = (hole + 1) & mask; entries_[next].is_used; next = (next + 1) & mask) {
            if (((next - home_of(entries_[next].key)) & mask) < ((next - hole) & mask)) continue;
            entries_[hole] = std::move(entries_[next]);
            hole = next;
        }
        entries_[hole] = {};
        --n_;
    }
    /// Makes room for so many entries. Throws std::bad_alloc.
    void reserve(size_t n) {
        if (2 * n > entries_.size()) resize(2 * n);
    }

  private:
    struct entry {
        Key key = {};
        bool is_used = false;
        Value value = {};
    };

    static uint64_t bits(uint64_t key) { return key; }
    static uint64_t bits(const void *key) { return reinterpret_cast<uintptr_t>(key); }
    size_t home_of(Key key) const { return static_cast<size_t>((bits(key) * uint64_t{0x9E3779B97F4A7C15}) >> shift_); }
    /// Where the key is, or where it would come.
    size_t slot_of(Key key) const {
        size_t slot = home_of(key);
        while (entries_[slot].is_used && entries_[slot].key != key) slot = (slot + 1) & (entries_.size() - 1);
        return slot;
    }
    void resize(size_t least) {
        size_t size = 2;
        int shift = 63;
        for (; size < least; --shift) size *= 2;
        std::vector<entry> old(size);  // may throw, and then nothing has changed
        old.swap(entries_);
        shift_ = shift;
        for (entry &e : old) {
            if (e.is_used) entries_[slot_of(e.key)] = std::move(e);
        }
    }

    std::vector<entry> entries_;  ///< a power of two, or none; at least half of them are free
    size_t n_ = 0;
    int shift_ = 63;
};

}  // namespace agq
