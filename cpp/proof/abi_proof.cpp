#include "proof/abi_proof.h"

#include <chrono>

#include "host/loaded_library.h"
#include "proof/parts.h"

namespace agq {

proof_functions functions;

namespace {

std::vector<abi_proof> made;

/// In order: each proof relies on the ones before it.
const struct {
    const char *name;
    void (*prove)(findings *);
} all_proofs[] = {{"interface version", prove_api_version},
                  {"registry table", prove_registry_table},
                  {"device table", prove_device_table},
                  {"backend table", prove_backend_table},
                  {"CPU device", prove_cpu_device},
                  {"type table", prove_type_table},
                  {"tensors", prove_tensor},
                  {"operations", prove_operations},
                  {"graphs", prove_graph},
                  {"scheduler", prove_scheduler}};

template <class function>
bool make(const char *name, function prove, std::string *error) {
    using clock = std::chrono::steady_clock;
    findings found;
    const auto begun = clock::now();
    prove(&found);
    const std::chrono::duration<double, std::micro> time = clock::now() - begun;
    made.push_back({name, found.good(), found.text(), time.count()});
    if (!found.good()) {
        *error = std::string("ggml ") + host.ggml_version() + " in " +
                 library_path(reinterpret_cast<const void *>(host.ggml_version)) + " cannot run AGQ4: " + found.text() +
                 " (proof of the " + name + "); " + advice();
    }
    return found.good();
}

void find_functions(const loaded_library &library, findings *f) {
#define AGQ_FIND(result, name, parameters)                                        \
    functions.name = reinterpret_cast<result(*) parameters>(library.find(#name)); \
    f->require(functions.name, "the host has no function " #name " that can be found");
    AGQ_PROOF_FUNCTIONS(AGQ_FIND)
#undef AGQ_FIND
    f->summarize("all functions found");
}

}  // namespace

const std::vector<abi_proof> &abi_proofs() {
    return made;
}

bool prove_abi(const loaded_library &library, std::string *error) {
    made.clear();
    if (!make("functions", [&](findings *f) { find_functions(library, f); }, error)) return false;
    for (const auto &proof : all_proofs) {
        if (!make(proof.name, proof.prove, error)) return false;
    }
    return true;
}

bool prove_registered_type(std::string *error) {
    return make("registered type", prove_known_type, error);
}

}  // namespace agq
