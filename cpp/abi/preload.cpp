// For programs that never look for plugins: put in front of the host's libraries with LD_PRELOAD, the plugin's own
// llama_backend_init is called in place of libllama's, calls it, and then has ggml load the plugin.
//
// llama_backend_init looks for plugins only if no backend is linked in, so llama-cli, llama-server and llama-perplexity
// of a default build never read GGML_BACKEND_PATH. Where the plugin is not preloaded, nobody finds this function:
// plugins are opened locally.
#ifdef __linux__

#include <dlfcn.h>

#include "abi/export.h"
#include "host/loaded_library.h"

AGQ_EXPORT void llama_backend_init();

namespace {

/// The function of the host that called, or null. A Python extension keeps its libraries to itself, so they are asked
/// first; the program itself, which finds the plugin before its libraries, is served by the next one in order.
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
