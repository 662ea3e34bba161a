// Memory that is moved into huge pages keeps its address and content, also while other threads read it.
#include "base/huge_pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/free_memory.h"

namespace {

constexpr size_t huge = size_t{2} << 20;
int failures = 0;

void check(bool right, const std::string &what) {
    if (right) return;
    std::printf("WRONG: %s\n", what.c_str());
    ++failures;
}

uint64_t value_at(size_t i) {
    return i * 0x9e3779b97f4a7c15u + 1;
}

/// A file of these bytes in the folder of the test, mapped as llama.cpp maps models. It has no name any more.
struct mapped_file {
    explicit mapped_file(size_t bytes) : size(bytes) {
        char name[] = "huge-pages-XXXXXX";
        const int file = mkstemp(name);
        unlink(name);
        std::vector<uint64_t> values(bytes / 8);
        for (size_t i = 0; i < values.size(); ++i) values[i] = value_at(i);
        const bool written = write(file, values.data(), bytes) == static_cast<ssize_t>(bytes);
        void *mapped = written ? mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
        close(file);
        if (mapped == MAP_FAILED) {
            std::perror("mapping a file");
            std::exit(1);
        }
        data = static_cast<const uint64_t *>(mapped);
    }
    ~mapped_file() { munmap(const_cast<uint64_t *>(data), size); }
    mapped_file(const mapped_file &) = delete;
    mapped_file &operator=(const mapped_file &) = delete;

    bool intact() const {
        for (size_t i = 0; i < size / 8; ++i) {
            if (data[i] != value_at(i)) return false;
        }
        return true;
    }

    const uint64_t *data = nullptr;
    size_t size;
};

/// Bytes of the mapping at this address that belong to no file; only whole lines of /proc/self/maps are counted.
size_t anonymous_bytes(const void *data, size_t size) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    size_t found = 0;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        unsigned long from = 0, to = 0, inode = 0;
        if (std::sscanf(line.c_str(), "%lx-%lx %*s %*s %*s %lu", &from, &to, &inode) != 3 || inode != 0) continue;
        if (from < begin + size && to > begin) found += std::min(to, begin + size) - std::max(from, begin);
    }
    return found;
}

bool system_has_huge_pages() {
    std::ifstream enabled("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string setting;
    return std::getline(enabled, setting) && setting.find("[never]") == std::string::npos;
}

void moves_ranges_while_they_are_read() {
    const mapped_file file(24 * huge + 4096);
    std::atomic<bool> done{false}, right{true};
    std::thread reader([&] {
        while (!done) right = right && file.intact();
    });
    const auto at = [&](size_t byte, size_t size) {
        return agq::memory_range{reinterpret_cast<const char *>(file.data) + byte, size};
    };
    // Two ranges in one huge page, one that ends with the file, one that is empty.
    const auto result = agq::move_to_huge_pages(
        {at(20 * huge, 4 * huge + 4096), at(100, 50), at(huge + 5, 3 * huge), at(9 * huge, 0)}, 2, true);
    done = true;
    reader.join();
    check(right && file.intact(), "the content changed");
    check(result.obstacle.empty(), "not everything was moved: " + result.obstacle);
    const size_t moved = anonymous_bytes(file.data, file.size);
    check(moved == result.copied, "said " + std::to_string(result.copied) + ", moved " + std::to_string(moved));
    // Each range and what shares its huge pages, wherever the mapping begins, but not all of the file.
    check(moved >= 7 * huge && moved <= 13 * huge, "moved " + std::to_string(moved));

    const auto again = agq::move_to_huge_pages({at(20 * huge, 4 * huge)}, 2, true);
    check(again.copied == 0 && file.intact(), "moved twice");
}

void leaves_what_it_must_not_move() {
    const mapped_file file(4 * huge);
    const void *locked = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (syscall(SYS_mlock, locked, 4096) == 0) {  // sanitizers replace mlock by nothing
        const auto result = agq::move_to_huge_pages({{file.data, file.size}}, 2, true);
        check(result.copied == 0 && !result.obstacle.empty(), "moved although memory is locked");
        syscall(SYS_munlock, locked, 4096);
    }
    const int shared = memfd_create("model", 0);
    if (shared >= 0 && ftruncate(shared, 4 * huge) == 0) {
        void *data = mmap(nullptr, 4 * huge, PROT_READ, MAP_SHARED, shared, 0);
        check(agq::move_to_huge_pages({{data, 4 * huge}}, 2, true).copied == 0, "moved a file that is in memory");
        munmap(data, 4 * huge);
    }
    char *writable =
        static_cast<char *>(mmap(nullptr, 4 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    std::memset(writable, 7, 4 * huge);
    check(agq::move_to_huge_pages({{writable, 4 * huge}}, 2, true).copied == 0, "copied memory that is no file's");
    check(writable[0] == 7 && writable[4 * huge - 1] == 7, "changed memory that is no file's");
    writable[0] = 8;  // it can still be written
    munmap(writable, 4 * huge);
    check(agq::move_to_huge_pages({}, 2, true).copied == 0, "moved nothing");
}

void renews_empty_memory_only() {
    std::ifstream enabled("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string setting;
    std::getline(enabled, setting);
    const bool given_anyway = setting.find("[always]") != std::string::npos;
    constexpr size_t size = 12 * huge;
    void *mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const auto start = (reinterpret_cast<uintptr_t>(mapped) + huge - 1) / huge * huge;  // the 11 pages from here on
    char *data = static_cast<char *>(mapped) + (start - reinterpret_cast<uintptr_t>(mapped));
    std::memset(mapped, 0, size);
    data[0] = 1;                // not in a range
    data[5 * huge - 1] = 2;     // the last byte of a page
    data[7 * huge] = 3;         // the first one of a page
    data[9 * huge + 2000] = 4;  // between two ranges
    // The first page is not whole, and neither is the last one. Pages 4, 7 and 9 are not empty.
    const size_t renewed = agq::renew_in_huge_pages(
        {{data + 9 * huge + 4000, huge}, {data + 1, 9 * huge + 1000}, {data + 2 * huge, 100}, {data, 0}});
    check(renewed == (given_anyway ? 0 : 6 * huge), "renewed " + std::to_string(renewed));
    size_t sum = 0;
    for (size_t i = 0; i < 11 * huge; ++i) sum += static_cast<size_t>(data[i]);
    check(sum == 10 && data[0] == 1 && data[5 * huge - 1] == 2 && data[7 * huge] == 3 && data[9 * huge + 2000] == 4,
          "changed memory that is not empty");
    std::memset(data, 5, 11 * huge);
    check(data[3 * huge] == 5, "renewed memory cannot be written");
    munmap(mapped, size);

    // A file's pages would come back with the content of the file.
    const int file = memfd_create("cache", 0);
    if (file < 0 || ftruncate(file, 4 * huge) != 0 || pwrite(file, "text", 4, 2 * huge) != 4) return;
    char *copy = static_cast<char *>(mmap(nullptr, 4 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0));
    std::memset(copy, 0, 4 * huge);
    check(agq::renew_in_huge_pages({{copy, 4 * huge}}) == 0 && copy[2 * huge] == 0, "renewed a file");
    munmap(copy, 4 * huge);
    close(file);
}

void reads_the_state_of_memory() {
    const agq::memory_state state = agq::read_memory_state();
    const uint64_t machine =
        static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    check(state.available > 0 && state.available <= state.total && state.total <= machine,
          std::to_string(state.available) + " of " + std::to_string(state.total) + " available");
}

}  // namespace

int main() {
    reads_the_state_of_memory();
    if (!system_has_huge_pages()) {
        const mapped_file file(4 * huge);
        check(agq::move_to_huge_pages({{file.data, file.size}}, 2, true).copied == 0, "moved without huge pages");
        std::printf("this system has no transparent huge pages\n");
        return failures ? 1 : 0;
    }
    moves_ranges_while_they_are_read();
    leaves_what_it_must_not_move();
    renews_empty_memory_only();
    std::printf("%d wrong\n", failures);
    return failures ? 1 : 0;
}
