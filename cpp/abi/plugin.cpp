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
#include "host/profile.h"
#include "host/type_registry.h"
#include "kernels/select.h"
#include "prune/history.h"
#include "rewrite/mixed_activations.h"

namespace {

std::string last_error;

const agq::kernel *prepare() {
    if (!agq::connect_host(&last_error)) return nullptr;
    if (agq::host.ggml_backend_reg_by_name("AGQ")) {
        last_error = "the AGQ plugin is loaded already";
        return nullptr;
    }
    const std::string forced = agq::read_options().force_isa;
    const agq::kernel *kern = agq::select_kernel(forced.empty() ? nullptr : forced.c_str(), &last_error);
    return kern && agq::register_type(&last_error) ? kern : nullptr;
}

}  // namespace

/// Called by ggml_backend_load: the registry, or null if this host cannot be used; the reason goes to the host's log
/// and to agq_last_error.
AGQ_EXPORT agq::ggml_backend_reg *ggml_backend_init() {
    const agq::kernel *kern = prepare();
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

/// Sets how contexts that this thread creates from now on prune (docs/pruning.md, "Control"); null: as AGQ_PRUNE says.
/// Returns null, or what is wrong with the text (valid until the next call in this thread).
AGQ_EXPORT const char *agq_set_prune(const char *text) {
    std::string &error = agq::thread_value<std::string, struct prune_error>();
    return agq::set_thread_pruning(text, &error) ? nullptr : error.c_str();
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
