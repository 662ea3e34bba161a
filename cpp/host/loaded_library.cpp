#include "host/loaded_library.h"

#include <cstdint>
#include <utility>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#ifdef __linux__
#include <link.h>
#endif

namespace agq {

loaded_library loaded_library::offering(const char *name, const void *address) {
    loaded_library own(address);
    return own.find(name) ? std::move(own) : loaded_library();
}

loaded_library::loaded_library(loaded_library &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}

#ifdef _WIN32

namespace {

HMODULE module_of(const void *address) {
    HMODULE module = nullptr;
    GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS, static_cast<LPCSTR>(address), &module);
    return module;
}

}  // namespace

loaded_library::loaded_library(const void *address) : handle_(module_of(address)) {}

loaded_library::~loaded_library() {
    if (handle_) FreeLibrary(static_cast<HMODULE>(handle_));
}

void *loaded_library::find(const char *name) const {
    // On Windows a look-up does not search a library's dependencies. Those of llama.cpp have fixed names.
    const HMODULE candidates[] = {static_cast<HMODULE>(handle_),   GetModuleHandleA("ggml-base.dll"),
                                  GetModuleHandleA("ggml.dll"),    GetModuleHandleA("libggml-base.dll"),
                                  GetModuleHandleA("libggml.dll"), GetModuleHandleA("llama.dll"),
                                  GetModuleHandleA("libllama.dll")};
    for (const HMODULE module : candidates) {
        if (!module) continue;
        if (void *symbol = reinterpret_cast<void *>(GetProcAddress(module, name))) return symbol;
    }
    return nullptr;
}

std::string library_path(const void *address) {
    const HMODULE module = module_of(address);
    char path[MAX_PATH];
    const DWORD length = module ? GetModuleFileNameA(module, path, MAX_PATH) : 0;
    if (module) FreeLibrary(module);
    return std::string(path, length);
}

const void *library_base(const void *address) {
    const HMODULE module = module_of(address);
    if (module) FreeLibrary(module);
    return module;
}

#else

loaded_library::loaded_library(const void *address) {
    // Not every system can open the program itself by name. Its symbols are global, so they are found without a handle.
    const std::string path = library_path(address);
    if (!path.empty()) handle_ = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

loaded_library::~loaded_library() {
    if (handle_) dlclose(handle_);
}

void *loaded_library::find(const char *name) const {
    return dlsym(handle_ ? handle_ : RTLD_DEFAULT, name);
}

std::string library_path(const void *address) {
    Dl_info info;
    return dladdr(address, &info) && info.dli_fname ? info.dli_fname : "";
}

#ifdef __linux__

namespace {

struct wanted {
    uintptr_t address;
    const void *base;
};

int look_into(dl_phdr_info *library, size_t, void *data) {
    wanted *w = static_cast<wanted *>(data);
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const auto &part = library->dlpi_phdr[i];
        const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
        if (part.p_type == PT_LOAD && w->address >= begin && w->address - begin < part.p_memsz)
            w->base = library->dlpi_phdr;
    }
    return w->base != nullptr;
}

}  // namespace

/// dladdr(3) also looks up the symbol, which takes half a millisecond in a library with many symbols.
const void *library_base(const void *address) {
    wanted w = {reinterpret_cast<uintptr_t>(address), nullptr};
    dl_iterate_phdr(look_into, &w);
    return w.base;
}

#else

const void *library_base(const void *address) {
    Dl_info info;
    return dladdr(address, &info) ? info.dli_fbase : nullptr;
}

#endif

#endif

}  // namespace agq
