#include "base/free_memory.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>

namespace agq {

namespace {

/// The number behind a word at the beginning of a line, in a file such as /proc/meminfo.
std::optional<uint64_t> number_after(const std::string &path, const std::string &word) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        std::istringstream fields(line);
        std::string name;
        uint64_t value = 0;
        if (fields >> name >> value && name == word) return value;
    }
    return std::nullopt;
}

std::optional<uint64_t> number_in(const std::string &path) {
    std::ifstream file(path);
    uint64_t value = 0;
    if (file >> value) return value;  // "max" is not a number: no limit
    return std::nullopt;
}

/// Narrows `state` by the limit of one control group. Its page cache counts as free.
void apply_limit(memory_state *state, std::optional<uint64_t> limit, std::optional<uint64_t> used,
                 std::optional<uint64_t> cached) {
    if (!limit || !used || *limit >= state->total) return;
    const uint64_t taken = *used - std::min(*used, cached.value_or(0));
    state->total = *limit;
    state->available = std::min(state->available, *limit - std::min(*limit, taken));
}

/// All groups from the process's own up to the root: any of them may have a limit.
void apply_groups(memory_state *state) {
    std::ifstream groups("/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // number:controllers:path
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const bool unified = controllers.empty();  // version 2
        if (!unified && controllers.find("memory") == std::string::npos) continue;
        const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
        std::string path = line.substr(second + 1);
        while (true) {
            const std::string folder = root + (path == "/" ? "" : path) + "/";
            if (unified) {
                apply_limit(state, number_in(folder + "memory.max"), number_in(folder + "memory.current"),
                            number_after(folder + "memory.stat", "file"));
            } else {
                apply_limit(state, number_in(folder + "memory.limit_in_bytes"),
                            number_in(folder + "memory.usage_in_bytes"),
                            number_after(folder + "memory.stat", "total_cache"));
            }
            if (path.size() <= 1) break;
            path.resize(path.rfind('/'));
            if (path.empty()) path = "/";
        }
    }
}

}  // namespace

memory_state read_memory_state() {
    memory_state state;
    const auto total = number_after("/proc/meminfo", "MemTotal:");
    const auto available = number_after("/proc/meminfo", "MemAvailable:");
    if (!total || !available) return state;
    state.total = *total * 1024;
    state.available = *available * 1024;
    apply_groups(&state);
    return state;
}

}  // namespace agq
