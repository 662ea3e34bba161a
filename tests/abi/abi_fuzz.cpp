// Tries hundreds of hosts that differ from the declaration in one struct, one number or one order. The proofs must
// refuse each host that would make the plugin misread something, and must never crash. Prints the number of hosts.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <set>

#include "fake_host.h"
#include "host/host.h"
#include "host/type_registry.h"
#include "proof/abi_proof.h"

namespace {

struct variant {
    std::string name;
    host_layout layout;
    bool harmful;
};

struct part {
    const char *name;
    struct_layout host_layout::*layout;
    /// Fields that the plugin reads or writes and that the host uses, too.
    std::set<std::string> used;
    bool fixed_size;  ///< whether plugin and host each create such objects for the other
    bool least_size;  ///< whether the plugin writes the whole struct into the host's memory
};

const part parts[] = {
    {"tensor",
     &host_layout::tensor,
     {"type", "buffer", "ne", "nb", "op", "op_params", "flags", "src", "view_src", "view_offs", "data", "name"},
     true,
     true},
    {"traits", &host_layout::traits, {"type_name", "blck_size", "type_size", "is_quantized", "to_float"}, true, true},
    {"properties",
     &host_layout::properties,
     {"name", "description", "memory_free", "memory_total", "type", "buffer_from_host_ptr"},
     false,
     true},
    {"device",
     &host_layout::device,
     {"get_name", "get_description", "get_memory", "get_type", "get_props", "init_backend", "get_buffer_type",
      "buffer_from_host_ptr", "supports_op", "supports_buft", "reg"},
     false,
     false},
    {"backend",
     &host_layout::backend,
     {"guid", "get_name", "free", "graph_compute", "graph_optimize", "device"},
     false,
     false},
    {"registry",
     &host_layout::registry,
     {"api_version", "get_name", "get_device_count", "get_device", "get_proc_address"},
     false,
     false},
    {"custom", &host_layout::custom, {"function", "n_tasks", "userdata"}, false, false},
    {"permute", &host_layout::permute, {"axis0", "axis1", "axis2", "axis3"}, false, false},
    {"concat", &host_layout::concat, {"dim"}, false, false},
    {"norm", &host_layout::norm, {"eps"}, false, false},
    {"glu", &host_layout::glu, {"unit", "swapped", "alpha", "limit"}, false, false},
    {"clamp", &host_layout::clamp, {"min", "max"}, false, false},
    {"argsort", &host_layout::argsort, {"order"}, false, false},
    {"soft_max", &host_layout::soft_max, {"scale", "max_bias"}, false, false},
    {"flash_attention", &host_layout::flash_attention, {"scale", "max_bias", "soft_cap"}, false, false},
};

const host_layout declared = declared_layout();

/// Whether the plugin would misread something in a host with this struct.
bool is_harmful(const part &p, const struct_layout &changed) {
    const struct_layout &ours = declared.*p.layout;
    const auto moved = [&](const std::string &name) {
        return changed.offset(name) != ours.offset(name) || changed.size_of(name) < ours.size_of(name);
    };
    if (std::any_of(p.used.begin(), p.used.end(), moved)) return true;
    return (p.fixed_size && changed.size() != ours.size()) || (p.least_size && changed.size() < ours.size());
}

void add_struct_variants(const part &p, std::vector<variant> *all) {
    const auto add = [&](const std::string &what, const std::function<void(std::vector<field> &)> &change) {
        variant v = {std::string(p.name) + ": " + what, declared, false};
        change((v.layout.*p.layout).fields());
        v.harmful = is_harmful(p, v.layout.*p.layout);
        all->push_back(v);
    };
    const std::vector<field> &fields = (declared.*p.layout).fields();
    for (size_t i = 0; i < fields.size(); ++i) {
        const auto at = static_cast<std::ptrdiff_t>(i);
        const std::string &name = fields[i].name;
        add("8 bytes before " + name, [&](auto &f) { f.insert(f.begin() + at, {"new", 8, 8}); });
        add("4 bytes before " + name, [&](auto &f) { f.insert(f.begin() + at, {"new", 4, 4}); });
        add("16 bytes before " + name, [&](auto &f) { f.insert(f.begin() + at, {"new", 16, 8}); });
        add("without " + name, [&](auto &f) { f.erase(f.begin() + at); });
        add(name + " twice as long", [&](auto &f) { f[i].size *= 2; });
        if (fields[i].size > 4) {
            add(name + " half as long",
                [&](auto &f) { f[i] = {name, f[i].size / 2, std::min(f[i].align, f[i].size / 2)}; });
        }
        add(name + " at the end", [&](auto &f) { std::rotate(f.begin() + at, f.begin() + at + 1, f.end()); });
        if (i > 0) {
            add(name + " at the beginning",
                [&](auto &f) { std::rotate(f.begin(), f.begin() + at, f.begin() + at + 1); });
            add(name + " exchanged with " + fields[i - 1].name, [&](auto &f) { std::swap(f[i], f[i - 1]); });
        }
    }
    add("8 bytes at the end", [](auto &f) { f.push_back({"new", 8, 8}); });
    add("in reverse", [](auto &f) { std::reverse(f.begin(), f.end()); });
}

void add_order_variants(const char *name, std::vector<std::string> host_layout::*order, std::vector<variant> *all) {
    const size_t n = (declared.*order).size();
    for (size_t i = 0; i < n; ++i) {
        for (size_t j = i + 1; j < n; ++j) {
            variant v = {std::string(name) + ": sources " + std::to_string(i) + " and " + std::to_string(j), declared,
                         true};
            std::swap((v.layout.*order)[i], (v.layout.*order)[j]);
            all->push_back(v);
        }
        variant v = {std::string(name) + ": one more before source " + std::to_string(i), declared, true};
        (v.layout.*order).insert((v.layout.*order).begin() + static_cast<std::ptrdiff_t>(i), "nothing");
        all->push_back(v);
    }
}

std::vector<variant> make_variants() {
    std::vector<variant> all = {{"as declared", declared, false}};
    for (const part &p : parts) add_struct_variants(p, &all);
    add_order_variants("ROPE", &host_layout::rope_sources, &all);
    add_order_variants("SOFT_MAX", &host_layout::soft_max_sources, &all);
    add_order_variants("FLASH_ATTN_EXT", &host_layout::flash_sources, &all);
    add_order_variants("SET_ROWS", &host_layout::set_rows_sources, &all);
    add_order_variants("GET_ROWS", &host_layout::get_rows_sources, &all);
    add_order_variants("MUL_MAT", &host_layout::product_sources, &all);
    add_order_variants("MUL_MAT_ID", &host_layout::expert_sources, &all);
    add_order_variants("ADD_ID", &host_layout::expert_bias_sources, &all);
    add_order_variants("GLU", &host_layout::glu_sources, &all);
    const auto add = [&](const char *name, bool harmful, const std::function<void(host_layout &)> &change) {
        variant v = {name, declared, harmful};
        change(v.layout);
        all.push_back(v);
    };
    add("other numbers of operations", false, [](auto &h) { h.shuffles_operations = true; });
    add("version 2 of the interface", false, [](auto &h) { h.api_version = 2; });
    add("version 1 of the interface", true, [](auto &h) { h.api_version = 1; });
    add("version 4 of the interface", true, [](auto &h) { h.api_version = 4; });
    add("a longer object before a tensor", true, [](auto &h) { h.object_bytes = 48; });
    add("another flag of inputs", true, [](auto &h) { h.flag_input = 4; });
    add("another flag of outputs", true, [](auto &h) { h.flag_output = 8; });
    add("flags exchanged", true, [](auto &h) { std::swap(h.flag_input, h.flag_output); });
    add("another flag of computed nodes", true, [](auto &h) { h.flag_compute = 32; });
    add("success is 1", true, [](auto &h) { h.success = 1; });
    add("nodes run without a flag", true, [](auto &h) { h.runs_unmarked_nodes = true; });
    add("thread and number of threads exchanged", true, [](auto &h) { h.swaps_thread_numbers = true; });
    add("another number of SWIGLU", true, [](auto &h) { h.swiglu = 3; });
    add("another number of SWIGLU_OAI", true, [](auto &h) { h.swiglu_oai = 4; });
    add("CPU devices are of type 1", true, [](auto &h) { h.device_cpu = 1; });
    add("slot 38 in use", true, [](auto &h) { h.our_slot_block = 32; });
    add("ggml_init with other parameters", true, [](auto &h) { h.takes_parameters_of_init_as_is = false; });
    add("more types", false, [](auto &h) { h.types.push_back("new"); });
    for (const size_t id : {0u, 1u, 2u, 8u, 26u, 27u, 30u}) {
        variant v = {"type " + std::to_string(id) + " is another", declared, true};
        std::swap(v.layout.types[id], v.layout.types[3]);
        all.push_back(v);
    }
    for (const char *version : {"0.15.0", "0.27.3", "1.0.0", "2.31"}) {
        add("a newer version", false, [version](auto &h) { h.version = version; });
    }
    for (const char *version : {"0.14.9", "0.9.11", "", "unknown", "main"}) {
        add("no supported version", true, [version](auto &h) { h.version = version; });
    }
    return all;
}

/// The same steps as plugin.cpp, from looking up the host's functions to registering the type.
bool is_accepted(std::string *reason) {
    agq::host = {};
    const auto library = agq::loaded_library::offering("ggml_version", reinterpret_cast<const void *>(is_accepted));
    return agq::connect_host(library, reason) && agq::prove_abi(library, reason) && agq::register_type(reason) &&
           agq::prove_registered_type(reason);
}

}  // namespace

int main(int argc, char **argv) {
    const bool verbose = argc > 1 && std::strcmp(argv[1], "--verbose") == 0;
    int refused = 0, accepted = 0, wrong = 0, harmful = 0;
    const std::vector<variant> all = make_variants();
    for (const variant &v : all) {
        std::fprintf(stderr, "%s\n", v.name.c_str());  // if the program crashes, the last line names the host
        make_host(v.layout);
        std::string reason;
        const bool ok = is_accepted(&reason);
        const std::string misuse = host_misuse();
        harmful += v.harmful;
        (ok ? accepted : refused) += 1;
        // A message must say which versions work or what else to do.
        const bool said = ok || reason.find("ggml 0.15") != std::string::npos ||
                          reason.find("type id 38") != std::string::npos ||
                          reason.find("CPU backend") != std::string::npos;
        const bool must_be_accepted = v.name == "as declared" || v.name == "other numbers of operations" ||
                                      v.name == "a newer version" || v.name == "version 2 of the interface" ||
                                      v.name == "more types";
        if ((ok && v.harmful) || (!ok && must_be_accepted) || !said || !misuse.empty()) {
            ++wrong;
            std::printf("WRONG %s: %s%s %s\n", v.name.c_str(), ok ? "accepted" : "refused: ", reason.c_str(),
                        misuse.c_str());
        } else if (verbose) {
            std::printf("%s: %s%s\n", v.name.c_str(), ok ? "accepted" : "refused: ", reason.c_str());
        }
        if (ok) agq::unregister_type();
    }
    std::printf("variants %zu harmful %d refused %d accepted %d wrong %d\n", all.size(), harmful, refused, accepted,
                wrong);
    return wrong != 0;
}
