// The entry points that a host and a running model need, nothing else; converter.cpp has the converter's.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "abi/export.h"
#include "backend/backend.h"
#include "base/environment.h"
#include "base/thread_value.h"
#include "host/host.h"
#include "host/loaded_library.h"
#include "host/profile.h"
#include "host/type_registry.h"
#include "kernels/select.h"
#include "proof/abi_proof.h"
#include "prune/history.h"
#include "rewrite/mixed_activations.h"

namespace {

std::string last_error;

/// Whether the plugin works in a host already; the reason why it cannot be loaded again goes to the last error.
bool is_in_use(const agq::loaded_library &library) {
    using find_fn = agq::ggml_backend_reg *(*)(const char *);
    if (const auto find = reinterpret_cast<find_fn>(library.find("ggml_backend_reg_by_name")); find && find("AGQ")) {
        last_error = "the AGQ plugin is loaded already";
        return true;
    }
    const void *known = reinterpret_cast<const void *>(agq::host.ggml_version);
    const std::string path = known ? agq::library_path(known) : "";  // empty if that host has been unloaded
    if (path.empty() || known == library.find("ggml_version") || !agq::host.ggml_backend_reg_by_name("AGQ")) {
        return false;
    }
    last_error = "the AGQ plugin is loaded already, into the ggml of " + path +
                 "; one copy of the plugin works with one ggml only, so load a copy of its file into the other";
    return true;
}

/// `caller`: an address in the library that asks for the plugin.
const agq::kernel *prepare(const void *caller) {
    last_error.clear();
    const auto library = agq::loaded_library::offering("ggml_version", caller);
    if (is_in_use(library) || !agq::connect_host(library, &last_error) || !agq::prove_abi(library, &last_error)) {
        return nullptr;
    }
    const std::string forced = agq::read_options().force_isa;
    const agq::kernel *kern = agq::select_kernel(forced.empty() ? nullptr : forced.c_str(), &last_error);
    if (!kern || !agq::register_type(&last_error)) return nullptr;
    if (!agq::prove_registered_type(&last_error)) {
        agq::unregister_type();
        return nullptr;
    }
    if (agq::is_untested_host()) {
        agq::log_line(agq::log_warn,
                      std::string("ggml ") + agq::host.ggml_version() +
                          " is newer than the releases that AGQ4 was tested with; its layout passed all " +
                          std::to_string(agq::abi_proofs().size()) + " proofs");
    }
    return kern;
}

}  // namespace

/// Called by ggml_backend_load: the registry, or null if this host cannot be used; the reason goes to the host's log
/// and to agq_last_error.
AGQ_EXPORT agq::ggml_backend_reg *ggml_backend_init() {
    const agq::kernel *kern = prepare(AGQ_CALLER);
    if (!kern) {
        agq::log_line(agq::log_error, last_error);
        return nullptr;
    }
    return agq::backend_registry(kern, agq::read_options());
}

/// Why the last ggml_backend_init returned null; empty if it did not.
AGQ_EXPORT const char *agq_last_error() {
    return last_error.c_str();
}

/// What the plugin found out about the host when it was loaded last, one proof for each index from 0 on: its name, what
/// was found (valid until the next ggml_backend_init), whether it passed (1 or 0), and the time it took in
/// microseconds. Any pointer may be null. Returns 1, or 0 if there is no proof of this index. After a proof that failed
/// there are none.
AGQ_EXPORT int32_t agq_abi_proof(int32_t index, const char **name, const char **found, int32_t *passed,
                                 double *microseconds) {
    const std::vector<agq::abi_proof> &proofs = agq::abi_proofs();
    if (index < 0 || static_cast<size_t>(index) >= proofs.size()) return 0;
    const agq::abi_proof &proof = proofs[static_cast<size_t>(index)];
    if (name) *name = proof.name;
    if (found) *found = proof.found.c_str();
    if (passed) *passed = proof.passed;
    if (microseconds) *microseconds = proof.microseconds;
    return 1;
}

/// Switches the profile on (with all times zero) or off, for all contexts of this process: 0 off, 1 wall clock, 2 CPU
/// time of the first thread.
AGQ_EXPORT void agq_profile(int clock) {
    agq::enable_profile(clock == 1   ? agq::profile_clock::wall
                        : clock == 2 ? agq::profile_clock::cpu
                                     : agq::profile_clock::off);
}

/// Writes the profile, cut off after `size` bytes, and returns its length: lines of kind, tab, nodes run, tab,
/// nanoseconds.
AGQ_EXPORT int agq_profile_report(char *text, int size) {
    const std::string report = agq::profile_report();
    if (text && size > 0) std::memcpy(text, report.data(), std::min(report.size(), static_cast<size_t>(size)));
    return static_cast<int>(report.size());
}

/// Sets an option of the contexts that this thread creates from now on, in place of an environment variable
/// (docs/environment.md): `option` 0 is AGQ_PRUNE, 1 AGQ_ACT_BITS, 2 AGQ_ATTENTION, 3 AGQ_FORCE_ISA. A null `text`
/// means: as the variable says. Returns null, or what is wrong with the text (valid until this thread's next call).
AGQ_EXPORT const char *agq_set_option(int32_t option, const char *text) {
    std::string &error = agq::thread_value<std::string, struct option_error>();
    error = "the plugin has no option " + std::to_string(option);
    if (option < 0 || option > 3) return error.c_str();
    const auto which = static_cast<agq::context_option>(option);
    if (text && !agq::check_context_option(which, text, &error)) return error.c_str();
    agq::set_context_option(which, text);
    return nullptr;
}

/// For each position of the sequence that this thread has computed last the layer behind which its token was dropped,
/// or -1: up to `n` of them go to `layers` (which may be null). Returns how many there are.
AGQ_EXPORT int32_t agq_last_pruned(int32_t *layers, int32_t n) {
    const std::vector<int32_t> &known = agq::prune_history::of_thread().layers();
    if (layers && n > 0) std::copy_n(known.begin(), std::min(known.size(), static_cast<size_t>(n)), layers);
    return static_cast<int32_t>(known.size());
}

/// The bits of the activations of each token in the calling thread's last call, 8 or 4; returns the number of tokens, 0
/// if they were not mixed.
AGQ_EXPORT int32_t agq_last_bits(int32_t *bits, int32_t n) {
    const std::vector<uint8_t> &four = agq::mixed_bits::last_call();
    for (size_t i = 0; bits && i < four.size() && static_cast<int32_t>(i) < n; ++i) bits[i] = four[i] ? 4 : 8;
    return static_cast<int32_t>(four.size());
}

/// For each token of the ubatch that this thread pruned last its importance at a pruning layer (NaN: it had left,
/// infinite: it was protected): up to `n` of them go to `values` (which may be null). Returns how many there are, 0 if
/// the layer is none.
AGQ_EXPORT int32_t agq_last_importance(int32_t layer, float *values, int32_t n) {
    const auto &known = agq::prune_history::of_thread().importance();
    const auto found = known.find(layer);
    if (found == known.end()) return 0;
    const std::vector<float> &of_layer = found->second;
    if (values && n > 0) std::copy_n(of_layer.begin(), std::min(of_layer.size(), static_cast<size_t>(n)), values);
    return static_cast<int32_t>(of_layer.size());
}
