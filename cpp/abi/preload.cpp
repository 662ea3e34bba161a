// For programs that never look for plugins: put in front of the host's libraries with LD_PRELOAD, the plugin's own
// llama_backend_init is called in place of libllama's, calls it, and then has ggml load the plugin.
//
// llama_backend_init looks for plugins only if no backend is linked in, so llama-cli, llama-server and llama-perplexity
// of a default build never read GGML_BACKEND_PATH. Where the plugin is not preloaded, nobody finds this function:
// plugins are opened locally.
#ifdef __linux__

#include <dlfcn.h>

namespace {

/// The next function of this name behind the plugin in the order of loading, or null.
template <typename function>
function find_next(const char *name) {
    return reinterpret_cast<function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void llama_backend_init() {
    if (const auto init = find_next<void (*)()>("llama_backend_init")) init();
    const auto load = find_next<void *(*)(const char *)>("ggml_backend_load");
    const auto find = find_next<void *(*)(const char *)>("ggml_backend_reg_by_name");
    Dl_info self;
    if (load && find && !find("AGQ") && dladdr(reinterpret_cast<void *>(llama_backend_init), &self)) {
        load(self.dli_fname);
    }
}

#endif
