// Time per kind of node, for `agq-gguf bench --profile`. While the profile is on, rewritten graphs hold a clock node
// after every node that does work. While it is off, nothing is added or measured.
#pragma once

#include <cstdint>
#include <string>

#include "host/host.h"

namespace agq {

/// Whether graphs rewritten from now on get clock nodes.
bool profile_enabled();

enum class profile_clock { off, wall, cpu };

/// Switches the profile on and resets all times, or off, which keeps the times. `cpu` counts the CPU time of a graph's
/// first thread, for machines that are busy with other work. It is accurate with one thread only, because waiting for
/// other threads counts as running.
void enable_profile(profile_clock clock);

/// Number of a kind of node, for `clock_node`; equal labels get equal numbers.
int profile_kind(const std::string &label);

/// One line per kind: label, tab, number of nodes run, tab, nanoseconds.
std::string profile_report();

/// For work outside of nodes: gets the current time, and adds a time to the kind with this label.
int64_t profile_time();
void add_profile_time(const std::string &label, int64_t nanoseconds);

/// Custom node: adds the time since the previous clock node to the kind that `userdata` points to (an int). A negative
/// kind starts the clock.
void clock_node(ggml_tensor *dst, int ith, int nth, void *userdata);

/// The profile's label of a host's node or of a product: the operation and, for products, the matrix.
std::string profile_label(const ggml_tensor *node);

}  // namespace agq
