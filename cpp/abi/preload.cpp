// For programs that never look for plugins: LD_PRELOAD puts the plugin before the host's libraries. The plugin's
// llama_backend_init then runs instead of libllama's. It calls libllama's, and then has ggml load the plugin.
//
// llama_backend_init looks for plugins only if no backend is linked in. So llama-cli, llama-server and llama-perplexity
// of a default build never read GGML_BACKEND_PATH. Without LD_PRELOAD this function is never called, because ggml opens
// plugins with local symbols.
#ifdef __linux__

#include <dlfcn.h>

#include "abi/export.h"
#include "host/loaded_library.h"

AGQ_EXPORT void llama_backend_init();

namespace {

/// The host's own version of a function, or null. A Python extension loads its libraries with local symbols, so the
/// caller's library is searched first. A program finds the plugin before its libraries; there the next definition in
/// search order is the right one.
template <typename function>
function find_behind(const agq::loaded_library &caller, const char *name) {
    void *own = caller.find(name);
    if (!own || own == reinterpret_cast<void *>(llama_backend_init)) own = dlsym(RTLD_NEXT, name);
    return reinterpret_cast<function>(own);
}

}  // namespace

AGQ_EXPORT void llama_backend_init() {
    const agq::loaded_library caller(AGQ_CALLER);
    if (const auto init = find_behind<void (*)()>(caller, "llama_backend_init")) init();
    const auto load = find_behind<void *(*)(const char *)>(caller, "ggml_backend_load");
    const auto find = find_behind<void *(*)(const char *)>(caller, "ggml_backend_reg_by_name");
    if (!load || !find || find("AGQ")) return;
    load(agq::library_path(reinterpret_cast<const void *>(llama_backend_init)).c_str());
}

#endif
