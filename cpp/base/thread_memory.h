// Scratch memory per thread, allocated before a graph runs: nodes run in the host's threads, where nothing may throw.
#pragma once

#include <cstddef>
#include <new>

namespace agq {

constexpr size_t cache_line = 64;

/// The next multiple of a cache line.
constexpr size_t align_up(size_t bytes) {
    return (bytes + cache_line - 1) / cache_line * cache_line;
}

/// One allocation, cut into equal parts, one for each thread.
class thread_memory {
  public:
    thread_memory() = default;
    ~thread_memory() { ::operator delete(memory_, alignment); }
    thread_memory(const thread_memory &) = delete;
    thread_memory &operator=(const thread_memory &) = delete;

    /// Makes room for `bytes` in each of `threads` threads. Throws std::bad_alloc and changes nothing if memory runs
    /// out.
    void reserve(size_t bytes, int threads) {
        const size_t part = align_up(bytes), total = part * static_cast<size_t>(threads);
        if (total > capacity_) {
            void *fresh = ::operator new(total, alignment);
            ::operator delete(memory_, alignment);
            memory_ = static_cast<unsigned char *>(fresh);
            capacity_ = total;
        }
        part_ = part;
    }

    /// The part of thread `ith`, aligned to a cache line.
    void *of(int ith) const { return memory_ + part_ * static_cast<size_t>(ith); }

  private:
    static constexpr std::align_val_t alignment{cache_line};
    unsigned char *memory_ = nullptr;
    size_t capacity_ = 0, part_ = 0;
};

}  // namespace agq
