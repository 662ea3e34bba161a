// Shared by the kernel tests: failure reports, random numbers, and operands between protected pages.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define AGQ_GUARD_PAGES 1
#endif

namespace {

int failures = 0;
std::mt19937_64 rng;

int random_int(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}
[[maybe_unused]] float random_float(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(rng);
}
bool chance(int one_in) {
    return random_int(1, one_in) == 1;
}

/// Reports a failure; prints details of the first few.
#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition) && ++failures <= 20) {                         \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (0)

// operands between protected pages

/// `size` elements that begin right after, or end right before, a page without access.
template <class T>
class guarded {
  public:
    explicit guarded(size_t size) : size_(size) {
#ifdef AGQ_GUARD_PAGES
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t bytes = (size * sizeof(T) + page - 1) / page * page;
        mapped_bytes_ = bytes + 2 * page;
        void *map = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED ||
            (bytes > 0 && mprotect(static_cast<char *>(map) + page, bytes, PROT_READ | PROT_WRITE) != 0)) {
            std::printf("mmap failed\n");
            std::exit(2);
        }
        mapped_ = static_cast<char *>(map);
        std::memset(mapped_ + page, canary, bytes);
        first_ = mapped_ + page;
        last_ = first_ + bytes;
        data_ = reinterpret_cast<T *>(chance(2) ? first_ : last_ - size * sizeof(T));
#else
        storage_.assign(size * sizeof(T) + 2 * 64, canary);
        first_ = storage_.data();
        last_ = first_ + storage_.size();
        data_ = reinterpret_cast<T *>(first_ + 64);
#endif
    }
    ~guarded() {
#ifdef AGQ_GUARD_PAGES
        munmap(mapped_, mapped_bytes_);
#endif
    }
    guarded(const guarded &) = delete;
    guarded &operator=(const guarded &) = delete;

    T *data() { return data_; }
    const T *data() const { return data_; }
    size_t size() const { return size_; }
    T &operator[](size_t i) { return data_[i]; }
    const T &operator[](size_t i) const { return data_[i]; }

    /// Whether the bytes around the elements, in the same pages, are unchanged.
    bool intact() const {
        for (const char *p = first_; p < last_; p++) {
            if (p == reinterpret_cast<const char *>(data_)) p += size_ * sizeof(T);
            if (p < last_ && *p != canary) return false;
        }
        return true;
    }

  private:
    static constexpr char canary = 0x5A;
    size_t size_;
    T *data_;
    char *first_, *last_;
#ifdef AGQ_GUARD_PAGES
    char *mapped_;
    size_t mapped_bytes_;
#else
    std::vector<char> storage_;
#endif
};

[[maybe_unused]] bool same_bits(float a, float b) {
    return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

}  // namespace
