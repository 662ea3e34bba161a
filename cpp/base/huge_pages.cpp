#include "base/huge_pages.h"

#ifdef __linux__

#include <sys/mman.h>
#include <sys/vfs.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/free_memory.h"

namespace agq {

namespace {

constexpr uintptr_t huge = uintptr_t{2} << 20;     // bytes; other sizes are left alone, see `has_huge_pages`
constexpr uintptr_t small = 4096;                  // bytes of an ordinary page
constexpr uintptr_t piece = uintptr_t{256} << 20;  // what is copied before it takes the file's place: bounds the memory
constexpr int advise_huge = 14, collapse = 25;     // MADV_HUGEPAGE, and MADV_COLLAPSE of Linux 6.1

uintptr_t down(uintptr_t address) {
    return address / huge * huge;
}
uintptr_t up(uintptr_t address) {
    return down(address + huge - 1);
}

/// Memory between two addresses.
struct span {
    uintptr_t begin, end;
    size_t size() const { return end - begin; }
    void *data() const { return reinterpret_cast<void *>(begin); }  // NOLINT(performance-no-int-to-ptr)
};

/// A line of /proc/self/maps.
struct mapping {
    span memory;
    std::string permissions, path;  // the path is empty, or in brackets, for memory of no file
    bool is_file() const { return !path.empty() && path[0] == '/'; }
    bool is_anonymous() const { return path.empty() || path == "[heap]" || path.rfind("[anon", 0) == 0; }
};

std::vector<mapping> read_mappings() {
    std::vector<mapping> found;
    std::ifstream file("/proc/self/maps");
    for (std::string line; std::getline(file, line);) {
        std::istringstream fields(line);
        mapping m;
        std::string offset, device, inode;
        char dash = 0;
        if (fields >> std::hex >> m.memory.begin >> dash >> m.memory.end >> m.permissions >> offset >> device >>
            inode) {
            std::getline(fields >> std::ws, m.path);
            found.push_back(m);
        }
    }
    return found;
}

/// The system's setting, the valid word of which is in brackets; empty if there is none.
std::string huge_pages_setting() {
    std::ifstream enabled("/sys/kernel/mm/transparent_hugepage/enabled");
    std::string setting;
    std::getline(enabled, setting);
    return setting;
}

/// Whether the system may give huge pages of the size that is expected here.
bool has_huge_pages() {
    std::ifstream size("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    uintptr_t bytes = 0;
    const std::string setting = huge_pages_setting();
    return !setting.empty() && setting.find("[never]") == std::string::npos && size >> bytes && bytes == huge;
}

/// Whether the system gives huge pages without being asked.
bool has_huge_pages_anyway() {
    return huge_pages_setting().find("[always]") != std::string::npos;
}

/// Files of memory file systems are in memory already, and a copy would take it twice.
bool is_in_memory(const std::string &path) {
    constexpr long tmpfs = 0x01021994, ramfs = 0x858458f6, hugetlbfs = 0x958458f6;
    struct statfs about;
    if (statfs(path.c_str(), &about) != 0) return path.rfind("/memfd:", 0) == 0;
    return about.f_type == tmpfs || about.f_type == ramfs || about.f_type == hugetlbfs;
}

/// Locked memory would lose its lock.
bool has_locked_memory() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmLck:", 0) == 0) return line.find_first_of("123456789") != std::string::npos;
    }
    return false;
}

std::vector<span> sorted_spans(const std::vector<memory_range> &ranges) {
    std::vector<span> sorted;
    for (const memory_range &range : ranges) {
        const auto begin = reinterpret_cast<uintptr_t>(range.data);
        if (range.size > 0) sorted.push_back({begin, begin + range.size});
    }
    std::sort(sorted.begin(), sorted.end(), [](const span &a, const span &b) { return a.begin < b.begin; });
    return sorted;
}

/// The ranges within a mapping, rounded outward to huge pages but not beyond it, and joined where they touch.
std::vector<span> within(const mapping &m, const std::vector<span> &sorted) {
    std::vector<span> found;
    for (const span &range : sorted) {
        if (range.end <= m.memory.begin || range.begin >= m.memory.end) continue;
        const span wider = {std::max(down(range.begin), m.memory.begin), std::min(up(range.end), m.memory.end)};
        if (!found.empty() && wider.begin <= found.back().end) {
            found.back().end = std::max(found.back().end, wider.end);
        } else {
            found.push_back(wider);
        }
    }
    return found;
}

/// Starts another thread; false if the system gives none.
template <typename Work>
bool start(std::vector<std::thread> *threads, const Work &work) {
    try {
        threads->emplace_back(work);
        return true;
    } catch (const std::exception &) {
        return false;
    }
}

void copy(const span &from, void *to, int n_threads) {
    std::atomic<uintptr_t> next{0};
    const auto work = [&] {
        // A unit ends at the end of a huge page, so each page is filled by one thread.
        for (uintptr_t unit; (unit = next.fetch_add(1)) < (up(from.end) - down(from.begin)) / huge;) {
            const uintptr_t begin = std::max(from.begin, down(from.begin) + unit * huge);
            const uintptr_t end = std::min(from.end, down(from.begin) + (unit + 1) * huge);
            std::memcpy(static_cast<char *>(to) + (begin - from.begin), span{begin, end}.data(), end - begin);
        }
    };
    std::vector<std::thread> others;
    while (static_cast<int>(others.size()) + 1 < n_threads && start(&others, work)) {
    }
    work();
    for (std::thread &other : others) other.join();
}

/// Puts a copy in huge pages in the place of `memory`. The kernel does the last step at once, also for other threads.
bool replace(const span &memory, int n_threads) {
    const size_t room = memory.size() + huge;
    void *reserved = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) return false;
    // The copy lies in huge pages just as `memory` does, so these can be moved whole.
    const auto start = reinterpret_cast<uintptr_t>(reserved);
    const uintptr_t wanted = down(start) + memory.begin % huge;
    const uintptr_t begin = wanted < start ? wanted + huge : wanted;
    const span fresh = {begin, begin + memory.size()};
    if (fresh.begin > start) munmap(reserved, fresh.begin - start);
    if (fresh.end < start + room) munmap(span{fresh.end, start + room}.data(), start + room - fresh.end);
    if (madvise(fresh.data(), fresh.size(), advise_huge) == 0) {
        copy(memory, fresh.data(), n_threads);
        mprotect(fresh.data(), fresh.size(), PROT_READ);
        if (mremap(fresh.data(), fresh.size(), fresh.size(), MREMAP_MAYMOVE | MREMAP_FIXED, memory.data()) !=
            MAP_FAILED) {
            return true;
        }
    }
    munmap(fresh.data(), fresh.size());
    return false;
}

/// Copies these parts of a file. On an error returns what could not be done.
std::string replace_all(const std::vector<span> &parts, int n_threads, size_t *copied) {
    for (const span &part : parts) {
        for (uintptr_t begin = part.begin; begin < part.end;) {
            const span next = {begin, std::min(part.end, down(begin) + piece)};
            if (!replace(next, n_threads)) return "the system gives no memory for a copy";
            *copied += next.size();
            begin = next.end;
        }
    }
    return "";
}

bool is_zero(const span &memory) {
    const char *bytes = static_cast<const char *>(memory.data());
    // Each byte equals the one before it, and the first one is zero.
    return bytes[0] == 0 && std::memcmp(bytes, bytes + 1, memory.size() - 1) == 0;
}

/// Gives whole huge pages of zeros back to the system. Returns their bytes.
size_t renew(const span &whole) {
    if (madvise(whole.data(), whole.size(), advise_huge) != 0) return 0;
    size_t renewed = 0;
    for (uintptr_t begin = whole.begin; begin < whole.end; begin += huge) {
        const span page = {begin, begin + huge};
        if (is_zero(page) && madvise(page.data(), page.size(), MADV_DONTNEED) == 0) renewed += page.size();
    }
    return renewed;
}

}  // namespace

huge_pages_result move_to_huge_pages(const std::vector<memory_range> &ranges, int n_threads, bool always) {
    huge_pages_result result;
    if (!has_huge_pages()) {
        result.obstacle = "the system gives none (/sys/kernel/mm/transparent_hugepage/enabled)";
        return result;
    }
    const std::vector<span> sorted = sorted_spans(ranges);
    std::vector<span> of_files;
    for (const mapping &m : read_mappings()) {
        const std::vector<span> parts = within(m, sorted);
        if (parts.empty()) continue;
        if (m.is_anonymous()) {
            for (const span &part : parts) {
                const span whole = {up(part.begin), down(part.end)};
                if (whole.begin >= whole.end) continue;
                if (madvise(whole.data(), whole.size(), collapse) == 0) result.collapsed += whole.size();
            }
        } else if (m.is_file() && m.permissions.rfind("r--", 0) == 0 && !is_in_memory(m.path)) {
            of_files.insert(of_files.end(), parts.begin(), parts.end());
        }
    }
    if (of_files.empty()) return result;
    if (has_locked_memory()) {
        result.obstacle = "the process has locked its memory";
        return result;
    }
    if (!always) {
        size_t needed = 0;
        for (const span &part : of_files) needed += part.size();
        const memory_state memory = read_memory_state();
        if (memory.available < needed + memory.total / 4) {
            result.obstacle = "less than a quarter of the memory would remain available";
            return result;
        }
    }
    result.obstacle = replace_all(of_files, n_threads, &result.copied);
    return result;
}

size_t renew_in_huge_pages(const std::vector<memory_range> &ranges) {
    if (!has_huge_pages() || has_huge_pages_anyway() || has_locked_memory()) return 0;
    std::vector<span> joined;
    for (const span &range : sorted_spans(ranges)) {
        if (!joined.empty() && range.begin < joined.back().end + small) {
            joined.back().end = std::max(joined.back().end, range.end);
        } else {
            joined.push_back(range);
        }
    }
    size_t renewed = 0;
    for (const mapping &m : read_mappings()) {
        if (!m.is_anonymous() || m.permissions != "rw-p") continue;
        for (const span &part : joined) {
            const span whole = {up(std::max(part.begin, m.memory.begin)), down(std::min(part.end, m.memory.end))};
            if (whole.begin < whole.end) renewed += renew(whole);
        }
    }
    return renewed;
}

}  // namespace agq

#else

namespace agq {

huge_pages_result move_to_huge_pages(const std::vector<memory_range> &, int, bool) {
    return {0, 0, "only Linux has them here"};
}

size_t renew_in_huge_pages(const std::vector<memory_range> &) {
    return 0;
}

}  // namespace agq

#endif
