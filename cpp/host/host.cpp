// Finds the host's functions and proves, before anything is touched, that it is laid out as host.h declares.
#include "host/host.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace agq {

host_api host;

namespace {

// The layouts in host.h were compared with the headers of these releases (docs/design.md, "Host releases").
constexpr int oldest_version[2] = {0, 15};
constexpr int newest_version[2] = {0, 25};
const char supported_releases[] = "ggml 0.15 to 0.25 (llama-cpp-python 0.3.30 to 0.3.36)";

void *find_symbol(const char *name) {
#ifdef _WIN32
    for (const char *library : {"ggml-base.dll", "ggml.dll", "libggml-base.dll", "libggml.dll"}) {
        if (HMODULE module = GetModuleHandleA(library)) {
            if (void *symbol = reinterpret_cast<void *>(GetProcAddress(module, name))) return symbol;
        }
    }
    return nullptr;
#else
    return dlsym(RTLD_DEFAULT, name);
#endif
}

bool find_functions(std::string *error) {
#define AGQ_FIND(result, name, parameters)                                                                           \
    host.name = reinterpret_cast<result(*) parameters>(find_symbol(#name));                                          \
    if (!host.name) {                                                                                                \
        *error = "the host program offers no function " #name "; supported are " + std::string(supported_releases) + \
                 ", loaded so that their symbols are visible";                                                       \
        return false;                                                                                                \
    }
    AGQ_HOST_FUNCTIONS(AGQ_FIND)
#undef AGQ_FIND
    return true;
}

bool check_version(std::string *error) {
    int found[2] = {-1, -1};
    const char *text = host.ggml_version();
    const bool parsed = std::sscanf(text, "%d.%d", &found[0], &found[1]) == 2;
    const auto rank = [](const int *v) { return v[0] * 10000 + v[1]; };
    if (!parsed || rank(found) < rank(oldest_version) || rank(found) > rank(newest_version)) {
        *error = std::string("the host's ggml is version ") + text + "; supported are " + supported_releases;
        return false;
    }
    return true;
}

bool find_operations(std::string *error) {
    const struct {
        const char *name;
        int *number;
    } wanted[] = {{"NONE", &host.op_none},
                  {"MUL_MAT", &host.op_mul_mat},
                  {"GET_ROWS", &host.op_get_rows},
                  {"SET_ROWS", &host.op_set_rows},
                  {"MUL_MAT_ID", &host.op_mul_mat_id},
                  {"SOFT_MAX", &host.op_soft_max},
                  {"FLASH_ATTN_EXT", &host.op_flash_attn_ext},
                  {"CUSTOM", &host.op_custom},
                  {"VIEW", &host.op_view},
                  {"RESHAPE", &host.op_reshape},
                  {"PERMUTE", &host.op_permute},
                  {"NORM", &host.op_norm},
                  {"TRANSPOSE", &host.op_transpose},
                  {"RMS_NORM", &host.op_rms_norm},
                  {"ROPE", &host.op_rope},
                  {"MUL", &host.op_mul},
                  {"ADD", &host.op_add},
                  {"GLU", &host.op_glu}};
    // All of these exist, so the search ends inside the host's table of names.
    // A host may ask for the plugin twice; then they are known already.
    const auto missing = [&wanted] {
        return std::any_of(std::begin(wanted), std::end(wanted), [](const auto &entry) { return *entry.number < 0; });
    };
    for (int op = 0; missing() && op < 256; ++op) {
        const char *name = host.ggml_op_name(op);
        if (!name) break;
        for (const auto &entry : wanted) {
            if (*entry.number < 0 && std::strcmp(entry.name, name) == 0) {
                *entry.number = op;
            }
        }
    }
    constexpr int swiglu = 2;  // in all supported releases
    if (std::strcmp(host.ggml_glu_op_name(swiglu), "SWIGLU") == 0) host.glu_swiglu = swiglu;
    if (missing()) *error = "the host's ggml lacks an operation that the plugin needs";
    return !missing();
}

void probe_function(ggml_tensor *, int, int, void *) {}

/// Creates a tensor and a custom node and looks for known values at the offsets of host.h.
bool check_layout(std::string *error) {
    bool good = host.ggml_tensor_overhead() >= sizeof(ggml_tensor);
    ggml_context *context = host.ggml_init({16 * 1024, nullptr, true});
    if (context) {
        ggml_tensor *a = host.ggml_new_tensor_3d(context, ggml_type_f32, 5, 7, 3);
        ggml_tensor *args[2] = {a, a};
        int marker = 0;
        ggml_tensor *c =
            host.ggml_custom_4d(context, ggml_type_f32, 2, 3, 4, 5, args, 2, probe_function, ggml_n_tasks_max, &marker);
        struct {
            ggml_custom_op function;
            int n_tasks;
            void *userdata;
        } stored;
        std::memcpy(&stored, c->op_params, sizeof(stored));
        good = good && a->type == ggml_type_f32 && a->ne[0] == 5 && a->ne[1] == 7 && a->ne[2] == 3 && a->ne[3] == 1 &&
               a->nb[0] == 4 && a->nb[1] == 20 && a->nb[2] == 140 && a->op == host.op_none && !a->src[0] && !a->data &&
               !a->view_src && a->name[0] == 0 && host.ggml_nbytes(a) == 420 && c->op == host.op_custom &&
               c->src[0] == a && c->src[1] == a && !c->src[2] && c->flags == 0 && stored.function == probe_function &&
               stored.userdata == &marker;
        host.ggml_free(context);
    } else {
        good = false;
    }
    const ggml_type_traits *q4_0 = host.ggml_get_type_traits(ggml_type_q4_0);
    good = good && q4_0 && q4_0->type_name && std::strcmp(q4_0->type_name, "q4_0") == 0 && q4_0->blck_size == 32 &&
           q4_0->type_size == 18 && q4_0->is_quantized;
    if (!good) {
        *error = std::string("the host's ggml ") + host.ggml_version() +
                 " is not laid out as expected; supported are " + supported_releases;
    }
    return good;
}

bool find_cpu(std::string *error) {
    host.cpu = host.ggml_backend_dev_by_type(device_cpu);
    if (!host.cpu) {
        *error = "the host has not loaded a CPU backend yet; load it before the AGQ plugin";
        return false;
    }
    using features_fn = ggml_backend_feature *(*)(ggml_backend_reg *);
    if (auto features = reinterpret_cast<features_fn>(cpu_function("ggml_backend_get_features"))) {
        for (auto *f = features(host.ggml_backend_dev_backend_reg(host.cpu)); f && f->name; ++f) {
            if (std::strcmp(f->name, "OPENMP") == 0) host.openmp = true;
        }
    }
    return true;
}

}  // namespace

bool connect_host(std::string *error) {
    return find_functions(error) && check_version(error) && find_operations(error) && check_layout(error) &&
           find_cpu(error);
}

bool is_empty_op(int op) {
    return op == host.op_none || op == host.op_view || op == host.op_reshape || op == host.op_permute ||
           op == host.op_transpose;
}

void *cpu_function(const char *name) {
    return host.ggml_backend_reg_get_proc_address(host.ggml_backend_dev_backend_reg(host.cpu), name);
}

void log_line(int level, const std::string &text) {
    using log_get_fn = void (*)(ggml_log_callback *, void **);
    static const auto log_get = reinterpret_cast<log_get_fn>(find_symbol("ggml_log_get"));
    ggml_log_callback callback = nullptr;
    void *user_data = nullptr;
    if (log_get) log_get(&callback, &user_data);
    if (callback) callback(level, ("agq: " + text + "\n").c_str(), user_data);
}

}  // namespace agq
