// The entry points for a host and a running model. Those for the converter are in converter.cpp.
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

/// Whether a host uses the plugin already. If so, sets the last error to the reason why it cannot be loaded again.
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

/// `caller`: an address in the library that loads the plugin.
const agq::kernel *prepare(const void *caller) {
    last_error.clear();
    const auto library = agq::loaded_library::offering("ggml_version", caller);
    if (is_in_use(library) || !agq::connect_host(library, &last_error) || !agq::prove_abi(library, &last_error)) {
        return nullptr;
    }
    const agq::options chosen = agq::read_options();
    last_error = chosen.error;
    if (!last_error.empty()) return nullptr;
    const std::string &forced = chosen.force_isa;
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

/// Called by ggml_backend_load. Returns the registry, or null if this host is not supported; the reason goes to the
/// host's log and to agq_last_error.
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

/// The ABI checks of the last load, one per `index`, counted from 0. Gets the check's name, what it found (valid until
/// the next ggml_backend_init), whether it passed (1 or 0), and its time in microseconds. Any pointer may be null.
/// Returns 1, or 0 if `index` is past the last check. A failed check is the last one.
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

/// Switches the profile for all contexts of this process: 0 off, 1 wall clock, 2 CPU time of the first thread.
/// Switching it on resets all times to zero.
AGQ_EXPORT void agq_profile(int clock) {
    agq::enable_profile(clock == 1   ? agq::profile_clock::wall
                        : clock == 2 ? agq::profile_clock::cpu
                                     : agq::profile_clock::off);
}

/// Writes the profile to `text`, truncated to `size` bytes, and returns its full length. Each line holds kind, tab,
/// nodes run, tab, nanoseconds.
AGQ_EXPORT int agq_profile_report(char *text, int size) {
    const std::string report = agq::profile_report();
    if (text && size > 0) std::memcpy(text, report.data(), std::min(report.size(), static_cast<size_t>(size)));
    return static_cast<int>(report.size());
}

/// Sets an option for the contexts that this thread creates from now on; it overrides the environment variable
/// (docs/environment.md). `option`: 0 is AGQ_PRUNE, 1 AGQ_ACT_BITS, 2 AGQ_ATTENTION, 3 AGQ_FORCE_ISA. A null `text`
/// goes back to the variable. Returns null, or an error message that is valid until this thread's next call.
AGQ_EXPORT const char *agq_set_option(int32_t option, const char *text) {
    std::string &error = agq::thread_value<std::string, struct option_error>();
    error = "the plugin has no option " + std::to_string(option);
    if (option < 0 || option > 3) return error.c_str();
    const auto which = static_cast<agq::context_option>(option);
    if (text && !agq::check_context_option(which, text, &error)) return error.c_str();
    agq::set_context_option(which, text);
    return nullptr;
}

/// Reports which tokens the last sequence of this thread lost: for each position, the layer after which its token was
/// dropped, or -1 if it was kept. Writes at most `n` entries to `layers`, which may be null. Returns the number of
/// positions.
AGQ_EXPORT int32_t agq_last_pruned(int32_t *layers, int32_t n) {
    const std::vector<int32_t> &known = agq::prune_history::of_thread().layers();
    if (layers && n > 0) std::copy_n(known.begin(), std::min(known.size(), static_cast<size_t>(n)), layers);
    return static_cast<int32_t>(known.size());
}

/// Writes the activation bits (8 or 4) of each token in the calling thread's last call to `bits`, at most `n` entries.
/// Returns the number of tokens, or 0 if the activations were not mixed.
AGQ_EXPORT int32_t agq_last_bits(int32_t *bits, int32_t n) {
    const std::vector<uint8_t> &four = agq::mixed_bits::last_call();
    for (size_t i = 0; bits && i < four.size() && static_cast<int32_t>(i) < n; ++i) bits[i] = four[i] ? 4 : 8;
    return static_cast<int32_t>(four.size());
}

/// The largest attention that each token got, in one head of one layer, from the last 16 tokens of the ubatch that this
/// thread pruned last. NaN: the token had been dropped before. Writes at most `n` entries to `values`, which may be
/// null. Returns the number of tokens, or 0 if pruning did not look at this head.
AGQ_EXPORT int32_t agq_last_head_weights(int32_t layer, int32_t head, float *values, int32_t n) {
    const auto &known = agq::prune_history::of_thread().head_weights();
    const auto found = known.find({layer, head});
    if (found == known.end()) return 0;
    const std::vector<float> &of_head = found->second;
    if (values && n > 0) std::copy_n(of_head.begin(), std::min(of_head.size(), static_cast<size_t>(n)), values);
    return static_cast<int32_t>(of_head.size());
}

/// Importance of each token, at one pruning layer, in the ubatch that this thread pruned last. NaN: the token had been
/// dropped before; infinity: it was protected. Writes at most `n` entries to `values`, which may be null. Returns the
/// number of tokens, or 0 if `layer` is not a pruning layer.
AGQ_EXPORT int32_t agq_last_importance(int32_t layer, float *values, int32_t n) {
    const auto &known = agq::prune_history::of_thread().importance();
    const auto found = known.find(layer);
    if (found == known.end()) return 0;
    const std::vector<float> &of_layer = found->second;
    if (values && n > 0) std::copy_n(of_layer.begin(), std::min(of_layer.size(), static_cast<size_t>(n)), values);
    return static_cast<int32_t>(of_layer.size());
}
