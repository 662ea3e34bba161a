// Time per kind of node, for `agq-gguf bench --profile`. While it is switched on, rewritten graphs hold a clock node
// behind every node that does something; while it is off, graphs hold none and nothing is measured.
#pragma once

#include <cstdint>
#include <string>

#include "host/host.h"

namespace agq {

/// Whether graphs that are rewritten now should hold clock nodes.
bool profile_enabled();

enum class profile_clock { off, wall, cpu };

/// Switches the profile on, with all times zero, or off, which keeps the times. `cpu` counts what the first thread of a
/// graph really ran, for machines that are busy with other work; it tells the truth for one thread only, because
/// waiting for others counts as running.
void enable_profile(profile_clock clock);

/// Number of a kind of node, for `clock_node`; the same label has the same number.
int profile_kind(const std::string &label);

/// One line for each kind: label, tab, number of nodes run, tab, nanoseconds.
std::string profile_report();

/// For work outside of all nodes: the time now, and time that is added to the kind with this label.
int64_t profile_time();
void add_profile_time(const std::string &label, int64_t nanoseconds);

/// Custom node: the time since the clock node before goes to the kind that `userdata` points at (an int); a negative
/// one starts the clock.
void clock_node(ggml_tensor *dst, int ith, int nth, void *userdata);

/// What to call the time of a host's node or of a product: the operation, and for products which matrix.
std::string profile_label(const ggml_tensor *node);

}  // namespace agq
