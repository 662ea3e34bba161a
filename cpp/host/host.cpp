// Looks up the host's functions. proof/abi_proof.h checks that they and their data match host.h.
#include "host/host.h"

#include <cstdio>
#include <cstring>

#include "host/tested_hosts.h"

namespace agq {

host_api host;

namespace {

#define AGQ_VERSION(ggml, name, version) ggml,
constexpr const char *tested_versions[] = {AGQ_TESTED_HOSTS(AGQ_VERSION)};
#undef AGQ_VERSION
#define AGQ_NAME(ggml, name, version) name " " version,
constexpr const char *tested_names[] = {AGQ_TESTED_HOSTS(AGQ_NAME)};
#undef AGQ_NAME
constexpr size_t n_tested = sizeof(tested_versions) / sizeof(*tested_versions);

/// Major and minor number as one comparable number; -1 if the text is not a version. Patch releases keep the layout.
int rank(const char *version) {
    int major = 0, minor = 0;
    const bool parsed = std::sscanf(version, "%d.%d", &major, &minor) == 2;
    return parsed ? major * 10000 + minor : -1;
}

bool find_functions(const loaded_library &library, std::string *error) {
    host.ggml_log_get = reinterpret_cast<decltype(host.ggml_log_get)>(library.find("ggml_log_get"));
#define AGQ_FIND(result, name, parameters)                                                    \
    host.name = reinterpret_cast<result(*) parameters>(library.find(#name));                  \
    if (!host.name) {                                                                         \
        *error = "the host program has no function " #name " that can be found; " + advice(); \
        return false;                                                                         \
    }
    AGQ_HOST_FUNCTIONS(AGQ_FIND)
#undef AGQ_FIND
    return true;
}

bool check_version(std::string *error) {
    const int found = rank(host.ggml_version());
    if (found < rank(tested_versions[0])) {
        *error = std::string("the host's ggml is version ") + host.ggml_version() + ", expected " + tested_versions[0] +
                 " or newer; " + advice();
        return false;
    }
    return true;
}

bool find_cpu(std::string *error) {
    host.cpu = host.ggml_backend_dev_by_type(device_cpu);
    if (!host.cpu) {
        *error = "the host has not loaded a CPU backend yet; load it before the AGQ plugin";
        return false;
    }
    if (!host.ggml_backend_dev_backend_reg(host.cpu)) {
        *error = "the host's CPU device belongs to no backend; " + advice();
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

bool connect_host(const loaded_library &library, std::string *error) {
    return find_functions(library, error) && check_version(error) && find_cpu(error);
}

bool is_untested_host() {
    return rank(host.ggml_version()) > rank(tested_versions[n_tested - 1]);
}

std::string advice() {
    const auto describe = [](size_t i) { return std::string(tested_versions[i]) + " (" + tested_names[i] + ")"; };
    return "the plugin was tested with ggml " + describe(0) + " to " + describe(n_tested - 1) +
           "; install a host of these versions, or a newer agq-gguf";
}

bool is_empty_op(int op) {
    return op == host.op_none || op == host.op_view || op == host.op_reshape || op == host.op_permute ||
           op == host.op_transpose;
}

void *cpu_function(const char *name) {
    return host.ggml_backend_reg_get_proc_address(host.ggml_backend_dev_backend_reg(host.cpu), name);
}

void log_line(int level, const std::string &text) {
    ggml_log_callback callback = nullptr;
    void *user_data = nullptr;
    if (host.ggml_log_get) host.ggml_log_get(&callback, &user_data);
    if (callback) callback(level, ("agq: " + text + "\n").c_str(), user_data);
}

}  // namespace agq
