// The one reach into the host's memory: GGUF loading accepts only types of ggml's own table, in which the slots of
// retired types stay, marked by a block size of 0. The table is constant data, so its page is made writable for one
// copy.
#include "host/type_registry.h"

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

/// What the slot held before it was filled.
ggml_type_traits retired = {};
bool is_filled = false;

bool write_constant(const void *target, const void *source, size_t bytes) {
#ifdef _WIN32
    DWORD before;
    void *address = const_cast<void *>(target);
    if (!VirtualProtect(address, bytes, PAGE_READWRITE, &before)) return false;
    std::memcpy(address, source, bytes);
    return VirtualProtect(address, bytes, before, &before) != 0;
#else
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(target) & ~(page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(target) + bytes + page - 1) & ~(page - 1);
    void *pages = reinterpret_cast<void *>(begin);
    if (mprotect(pages, end - begin, PROT_READ | PROT_WRITE) != 0) return false;
    std::memcpy(const_cast<void *>(target), source, bytes);
    // The table holds pointers, so the dynamic linker relocated it and then made it read-only: that is its former
    // state.
    return mprotect(pages, end - begin, PROT_READ) == 0;
#endif
}

}  // namespace

bool register_type(std::string *error) {
    const ggml_type_traits *slot = host.ggml_get_type_traits(ggml_type_id);
    if (slot->type_name && std::strcmp(slot->type_name, type_name) == 0 && slot->blck_size == ggml_block_size &&
        slot->type_size == ggml_block_bytes) {
        return true;
    }
    if (slot->blck_size != 0) {
        *error = "type id " + std::to_string(ggml_type_id) + " of ggml " + host.ggml_version() + " is taken by '" +
                 (slot->type_name ? slot->type_name : "?") + "' (block of " + std::to_string(slot->blck_size) +
                 "), expected an empty slot; " + advice();
        return false;
    }
    // The conversion functions stay null, because a row of AGQ4 is not contiguous: stock tools then say that the type
    // cannot be dequantized instead of reading garbage.
    ggml_type_traits ours = {};
    // The name must outlive the plugin, should the host unload it: somebody may have kept a pointer. So it is never
    // freed.
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
