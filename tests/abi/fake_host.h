// A fake host for the ABI proofs. It offers the ggml functions that the plugin calls, and lays out its structs as a
// `host_layout` says. It does only what the proofs need.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

struct field {
    std::string name;
    size_t size;
    size_t align;
};

/// A struct as a compiler lays it out: fields in order, each at the next multiple of its alignment.
class struct_layout {
  public:
    struct_layout() = default;
    explicit struct_layout(std::vector<field> fields) : fields_(std::move(fields)) {}

    static constexpr size_t absent = static_cast<size_t>(-1);

    std::vector<field> &fields() { return fields_; }
    const std::vector<field> &fields() const { return fields_; }
    size_t size() const { return end(); }
    size_t offset(const std::string &name) const;
    size_t size_of(const std::string &name) const;

  private:
    size_t end() const;

    std::vector<field> fields_;
};

/// Everything in which the fuzzed hosts differ.
struct host_layout {
    struct_layout tensor, traits, properties, device, backend, registry, custom;
    /// Operation parameters, in their order in `op_params`.
    struct_layout permute, concat, norm, clamp, argsort, glu, soft_max, flash_attention;
    /// Names of the sources of operations, in order.
    std::vector<std::string> rope_sources, soft_max_sources, flash_sources, set_rows_sources, get_rows_sources,
        product_sources, expert_sources, expert_bias_sources, glu_sources;
    size_t object_bytes = 32;
    int flag_input = 1, flag_output = 2, flag_compute = 16;
    int success = 0;
    int api_version = 3;
    int swiglu = 2, swiglu_oai = 3;
    int device_cpu = 0;
    int our_slot_block = 0;  ///< block size in the slot that must be empty
    bool runs_unmarked_nodes = false;
    bool swaps_thread_numbers = false;
    bool shuffles_operations = false;  ///< operations get other numbers, as happens between releases
    bool takes_parameters_of_init_as_is = true;
    std::vector<std::string> types;  ///< names in the order of their numbers
    std::string version = "0.26.0";
};

/// The layout that host.h declares.
host_layout declared_layout();

/// Creates all objects of the host again.
void make_host(const host_layout &layout);

/// Describes a function call that would have crashed a real host; empty if there was none.
std::string host_misuse();
