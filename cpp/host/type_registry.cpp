// The only place that writes to the host's memory. GGUF loading accepts only types in ggml's own table. The table keeps
// the slots of retired types, with a block size of 0. It is constant data, so its page is made writable for one copy.
#include "host/type_registry.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "format/blocks.h"
#include "host/host.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace agq {

namespace {

const char type_name[] = "agq4";

/// The slot's content before it was filled.
ggml_type_traits retired = {};
bool is_filled = false;

#ifdef _WIN32

bool write_constant(const void *target, const void *source, size_t bytes) {
    DWORD before;
    void *address = const_cast<void *>(target);
    if (!VirtualProtect(address, bytes, PAGE_READWRITE, &before)) return false;
    std::memcpy(address, source, bytes);
    return VirtualProtect(address, bytes, before, &before) != 0;
}

#else

/// The protection of the page at an address, as mprotect takes it.
int protection_of(uintptr_t address) {
    // The table holds pointers, so the dynamic linker relocated it and then made it read-only. Assume that where the
    // system does not report the protection.
    int found = PROT_READ;
#ifdef __linux__
    std::FILE *maps = std::fopen("/proc/self/maps", "r");
    char line[512];
    bool is_begin = true;  // a path may be longer than `line`
    while (maps && std::fgets(line, sizeof(line), maps)) {
        uintptr_t begin = 0, end = 0;
        char flags[5] = {};
        if (is_begin && std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s", &begin, &end, flags) == 3 &&
            begin <= address && address < end) {
            found = (flags[0] == 'r' ? PROT_READ : 0) | (flags[1] == 'w' ? PROT_WRITE : 0) |
                    (flags[2] == 'x' ? PROT_EXEC : 0);
            break;
        }
        is_begin = std::strchr(line, '\n') != nullptr;
    }
    if (maps) std::fclose(maps);
#else
    (void)address;
#endif
    return found;
}

bool write_constant(const void *target, const void *source, size_t bytes) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(target) & ~(page - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(target) + bytes - 1) & ~(page - 1);
    const auto protect = [page](uintptr_t at, int protection) {
        return mprotect(reinterpret_cast<void *>(at), page, protection) == 0;  // NOLINT(performance-no-int-to-ptr)
    };
    const int before_first = protection_of(first), before_last = protection_of(last);
    // `bytes` is less than a page, so they are on one or two pages.
    const bool writable = protect(first, PROT_READ | PROT_WRITE) && protect(last, PROT_READ | PROT_WRITE);
    if (writable) std::memcpy(const_cast<void *>(target), source, bytes);
    return protect(last, before_last) && protect(first, before_first) && writable;
}

#endif

}  // namespace

bool register_type(std::string *error) {
    const ggml_type_traits *slot = host.ggml_get_type_traits(ggml_type_id);
    if (slot->type_name && std::strcmp(slot->type_name, type_name) == 0 && slot->blck_size == ggml_block_size &&
        slot->type_size == ggml_block_bytes) {
        return true;
    }
    if (slot->blck_size != 0) {
        *error = "type id " + std::to_string(ggml_type_id) + " of ggml " + host.ggml_version() + " is used by '" +
                 (slot->type_name ? slot->type_name : "?") + "' (block of " + std::to_string(slot->blck_size) +
                 "), expected an empty slot; " + advice();
        return false;
    }
    // The conversion functions stay null, because a row of AGQ4 is not contiguous. Stock tools then report that they
    // cannot dequantize the type, instead of reading garbage.
    ggml_type_traits ours = {};
    // The name is never freed. If the host unloads the plugin, someone may still hold a pointer to it.
    static char *const name = std::strcpy(new char[sizeof(type_name)], type_name);
    ours.type_name = name;
    ours.blck_size = ggml_block_size;
    ours.type_size = ggml_block_bytes;
    ours.is_quantized = true;
    retired = *slot;
    if (!write_constant(slot, &ours, sizeof(ours))) {
        *error = "the operating system does not let the plugin write to ggml's type table";
        return false;
    }
    is_filled = true;
    return true;
}

void unregister_type() {
    if (is_filled) write_constant(host.ggml_get_type_traits(ggml_type_id), &retired, sizeof(retired));
    is_filled = false;
}

}  // namespace agq
