// Proves what the host reads from us. Every slot of a table gets a function that records the slot's number. The host's
// public functions, called with such a table, then show which slot they use.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <utility>

#include "host/loaded_library.h"
#include "proof/parts.h"

namespace agq {

namespace {

constexpr int n_words = 48;  // larger than any table, so that even a longer one is filled with recorders
int last_word = -1;
int calls = 0;

/// Stands in for a function of any type in the tables. It reads no parameters, and null is a valid result for all of
/// them.
template <int word>
void *record() {
    last_word = word;
    ++calls;
    return nullptr;
}

template <int... words>
std::array<void *, sizeof...(words)> make_recorders(std::integer_sequence<int, words...>) {
    return {reinterpret_cast<void *>(record<words>)...};
}

/// A host table in which every word is a function that records its own number.
template <class table>
class recorded_table {
  public:
    recorded_table() : words_(make_recorders(std::make_integer_sequence<int, n_words>{})) {
        static_assert(sizeof(table) <= sizeof(words_));
    }

    table *get() { return reinterpret_cast<table *>(words_.data()); }

    /// Requires that `call`, which calls the host's function `name`, uses word `expected` and no other.
    template <class function>
    void expect(findings *f, const char *name, int expected, function call) {
        if (!f->good()) return;
        last_word = -1;
        calls = 0;
        call();
        f->require(calls == 1 && last_word == expected,
                   std::string(name) + " uses " + (calls == 0 ? "no word" : "word " + std::to_string(last_word)) +
                       " of the table, expected word " + std::to_string(expected));
    }

  private:
    alignas(16) std::array<void *, n_words> words_;
};

}  // namespace

void prove_api_version(findings *f) {
    host.api_version = host.ggml_backend_dev_backend_reg(host.cpu)->api_version;
    const std::string found = "version " + std::to_string(host.api_version) + " of the backend interface";
    f->summarize(found);
    f->require(host.api_version >= oldest_api_version && host.api_version <= newest_api_version,
               "the host uses " + found + ", expected version " + std::to_string(oldest_api_version) + " to " +
                   std::to_string(newest_api_version));
}

void prove_registry_table(findings *f) {
    recorded_table<ggml_backend_reg> table;
    ggml_backend_reg *reg = table.get();
    reg->api_version = host.api_version;
    table.expect(f, "ggml_backend_reg_name", 1, [&] { functions.ggml_backend_reg_name(reg); });
    table.expect(f, "ggml_backend_reg_dev_count", 2, [&] { functions.ggml_backend_reg_dev_count(reg); });
    table.expect(f, "ggml_backend_reg_dev_get", 3, [&] { functions.ggml_backend_reg_dev_get(reg, 0); });
    table.expect(f, "ggml_backend_reg_get_proc_address", 4,
                 [&] { host.ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"); });
    f->summarize("4 functions in their places");
}

void prove_device_table(findings *f) {
    recorded_table<ggml_backend_device> table;
    ggml_backend_device *dev = table.get();
    size_t free = 0, total = 0;
    alignas(64) unsigned char room[1024];
    std::memset(room, 0xAA, sizeof(room));
    table.expect(f, "ggml_backend_dev_name", 0, [&] { functions.ggml_backend_dev_name(dev); });
    table.expect(f, "ggml_backend_dev_description", 1, [&] { functions.ggml_backend_dev_description(dev); });
    table.expect(f, "ggml_backend_dev_memory", 2, [&] { host.ggml_backend_dev_memory(dev, &free, &total); });
    table.expect(f, "ggml_backend_dev_type", 3, [&] { functions.ggml_backend_dev_type(dev); });
    table.expect(f, "ggml_backend_dev_get_props", 4, [&] { functions.ggml_backend_dev_get_props(dev, room); });
    table.expect(f, "ggml_backend_dev_init", 5, [&] { host.ggml_backend_dev_init(dev, nullptr); });
    table.expect(f, "ggml_backend_dev_buffer_type", 6, [&] { host.ggml_backend_dev_buffer_type(dev); });
    table.expect(f, "ggml_backend_dev_host_buffer_type", 7, [&] { functions.ggml_backend_dev_host_buffer_type(dev); });
    table.expect(f, "ggml_backend_dev_buffer_from_host_ptr", 8,
                 [&] { host.ggml_backend_dev_buffer_from_host_ptr(dev, room, sizeof(room), sizeof(room)); });
    table.expect(f, "ggml_backend_dev_supports_op", 9, [&] { host.ggml_backend_dev_supports_op(dev, nullptr); });
    table.expect(f, "ggml_backend_dev_supports_buft", 10, [&] { host.ggml_backend_dev_supports_buft(dev, nullptr); });
    table.expect(f, "ggml_backend_dev_offload_op", 11, [&] { functions.ggml_backend_dev_offload_op(dev, nullptr); });
    table.expect(f, "ggml_backend_event_new", 12, [&] { functions.ggml_backend_event_new(dev); });
    if (!f->good()) return;
    f->require(host.ggml_backend_dev_backend_reg(dev) == dev->reg,
               "the registry of a device is not word 15 of its table");
    // The host zeroes its struct before it calls us. If its struct is longer than ours, the rest stays zero; it must
    // not be shorter.
    const auto zeros = std::find_if(room, room + sizeof(room), [](unsigned char byte) { return byte != 0; }) - room;
    f->require(zeros >= static_cast<ptrdiff_t>(sizeof(ggml_backend_dev_props)),
               "the properties of a device take " + std::to_string(zeros) + " bytes, expected at least " +
                   std::to_string(sizeof(ggml_backend_dev_props)));
    f->summarize("13 functions and the registry in their places");
}

void prove_backend_table(findings *f) {
    recorded_table<ggml_backend> table;
    ggml_backend *backend = table.get();
    int event = 0;
    table.expect(f, "ggml_backend_name", 1, [&] { functions.ggml_backend_name(backend); });
    table.expect(f, "ggml_backend_free", 2, [&] { host.ggml_backend_free(backend); });
    table.expect(f, "ggml_backend_synchronize", 8, [&] { functions.ggml_backend_synchronize(backend); });
    table.expect(f, "ggml_backend_graph_plan_create", 9,
                 [&] { functions.ggml_backend_graph_plan_create(backend, nullptr); });
    table.expect(f, "ggml_backend_graph_compute_async", 13,
                 [&] { functions.ggml_backend_graph_compute_async(backend, nullptr); });
    table.expect(f, "ggml_backend_event_record", 14, [&] { functions.ggml_backend_event_record(&event, backend); });
    table.expect(f, "ggml_backend_event_wait", 15, [&] { functions.ggml_backend_event_wait(backend, &event); });
    if (!f->good()) return;
    f->require(functions.ggml_backend_guid(backend) == backend->guid,
               "the identifier of a backend is not word 0 of its table");
    f->require(functions.ggml_backend_get_device(backend) == backend->device,
               "the device of a backend is not word 17 of its table");
    f->summarize("7 functions, the identifier and the device in their places");
}

/// The other direction: the CPU device's own tables must agree with the public functions.
void prove_cpu_device(findings *f) {
    ggml_backend_device *cpu = host.cpu;
    ggml_backend_reg *reg = host.ggml_backend_dev_backend_reg(cpu);
    const ggml_backend_device_i &d = cpu->iface;
    const ggml_backend_reg_i &r = reg->iface;
    const void *library = library_base(reinterpret_cast<const void *>(d.get_name));
    const auto in_library = [library](auto *function, bool optional = false) {
        const void *address = reinterpret_cast<const void *>(function);
        return (optional && !address) || (library && library_base(address) == library);
    };
    const bool device_complete = in_library(d.get_name) && in_library(d.get_description) && in_library(d.get_memory) &&
                                 in_library(d.get_type) && in_library(d.get_props) && in_library(d.init_backend) &&
                                 in_library(d.get_buffer_type) && in_library(d.get_host_buffer_type, true) &&
                                 in_library(d.buffer_from_host_ptr) && in_library(d.supports_op) &&
                                 in_library(d.supports_buft) && in_library(d.offload_op, true);
    const bool registry_complete = in_library(r.get_name) && in_library(r.get_device_count) &&
                                   in_library(r.get_device) && in_library(r.get_proc_address);
    if (!f->require(device_complete, "the CPU device's table points out of its library") ||
        !f->require(registry_complete, "the CPU registry's table points out of its library")) {
        return;
    }
    const auto same = [f](const char *what, const char *own, const char *expected) {
        return f->require(own && expected && std::strcmp(own, expected) == 0,
                          std::string("the CPU device has two ") + what);
    };
    size_t free[2] = {}, total[2] = {};
    d.get_memory(cpu, &free[0], &total[0]);
    host.ggml_backend_dev_memory(cpu, &free[1], &total[1]);
    if (!same("names", d.get_name(cpu), functions.ggml_backend_dev_name(cpu)) ||
        !same("descriptions", d.get_description(cpu), functions.ggml_backend_dev_description(cpu)) ||
        !same("registry names", r.get_name(reg), functions.ggml_backend_reg_name(reg)) ||
        !f->require(d.get_type(cpu) == device_cpu && functions.ggml_backend_dev_type(cpu) == device_cpu,
                    "the CPU device is of another type") ||
        !f->require(total[0] == total[1] && total[0] > 0, "the CPU device has two amounts of memory") ||
        !f->require(cpu->reg == reg && r.get_device_count(reg) > 0 && r.get_device(reg, 0) == cpu,
                    "the CPU's registry does not hold the CPU device")) {
        return;
    }
    // Called twice: through the host, which zeroes the struct first, and directly. The direct call also proves the
    // place of a field whose value is zero: the CPU's type.
    alignas(64) unsigned char zeroed[1024], filled[1024];
    functions.ggml_backend_dev_get_props(cpu, zeroed);
    std::memset(filled, 0xAA, sizeof(filled));
    d.get_props(cpu, reinterpret_cast<ggml_backend_dev_props *>(filled));
    ggml_backend_dev_props props;
    std::memcpy(&props, filled, sizeof(props));
    f->require(props.name == d.get_name(cpu) && props.description == d.get_description(cpu) &&
                   props.type == device_cpu && props.memory_total == total[0] && props.memory_free <= total[0] &&
                   (props.memory_free > 0) == (free[0] > 0),
               "the properties of the CPU device are in other places than expected");
    // Of the first four capabilities, the CPU has the same one as our device. The fields may turn out not to be bools.
    const unsigned char expected[4] = {0, 0, 1, 0};
    f->require(std::memcmp(zeroed + offsetof(ggml_backend_dev_props, caps), expected, sizeof(expected)) == 0,
               "the CPU device's capabilities are in another order than expected");
    f->summarize("tables, properties and public functions agree");
}

namespace {

// ---- a backend like ours, for the scheduler ----

struct probe_context {
    ggml_backend *cpu = nullptr;
    int optimized = 0, computed = 0;
};

probe_context &context_of(ggml_backend *backend) {
    return *static_cast<probe_context *>(backend->context);
}

const char *probe_name(ggml_backend *) {
    return "probe";
}

void probe_optimize(ggml_backend *backend, ggml_cgraph *graph) {
    context_of(backend).optimized += host.ggml_graph_n_nodes(graph);
}

ggml_status probe_compute(ggml_backend *backend, ggml_cgraph *graph) {
    context_of(backend).computed += host.ggml_graph_n_nodes(graph);
    return host.ggml_backend_graph_compute(context_of(backend).cpu, graph);
}

const char *probe_device_name(ggml_backend_device *) {
    return "probe";
}

void probe_memory(ggml_backend_device *, size_t *free, size_t *total) {
    *free = *total = 0;
}

int probe_type(ggml_backend_device *) {
    return device_accel;
}

void probe_props(ggml_backend_device *device, ggml_backend_dev_props *props) {
    *props = {};
    props->name = props->description = probe_device_name(device);
    props->type = device_accel;
}

ggml_backend_buffer_type *probe_buffer_type(ggml_backend_device *) {
    return host.ggml_backend_dev_buffer_type(host.cpu);
}

bool probe_supports_op(ggml_backend_device *, const ggml_tensor *) {
    return true;
}

bool probe_supports_buft(ggml_backend_device *, ggml_backend_buffer_type *type) {
    return host.ggml_backend_dev_supports_buft(host.cpu, type);
}

}  // namespace

void prove_scheduler(findings *f) {
    ggml_backend_device device = {};
    device.iface.get_name = device.iface.get_description = probe_device_name;
    device.iface.get_memory = probe_memory;
    device.iface.get_type = probe_type;
    device.iface.get_props = probe_props;
    device.iface.get_buffer_type = probe_buffer_type;
    device.iface.supports_op = probe_supports_op;
    device.iface.supports_buft = probe_supports_buft;
    device.reg = host.ggml_backend_dev_backend_reg(host.cpu);
    probe_context context;
    uint8_t guid[16] = {};
    ggml_backend backend = {};
    backend.guid = &guid;
    backend.iface.get_name = probe_name;
    backend.iface.graph_compute = probe_compute;
    backend.iface.graph_optimize = probe_optimize;
    backend.device = &device;
    backend.context = &context;
    one_thread_cpu cpu;
    if (!f->require(cpu.get(), "the CPU device makes no backend")) return;
    context.cpu = cpu.get();

    constexpr size_t graph_size = 8;
    tensor_memory memory;
    ggml_context *tensors = memory.context(f);
    if (!tensors) return;
    ggml_tensor *x = functions.ggml_new_tensor_4d(tensors, ggml_type_f32, 4, 1, 1, 1);
    functions.ggml_set_input(x);
    ggml_tensor *y = functions.ggml_add(tensors, x, x);
    functions.ggml_set_output(y);
    ggml_cgraph *graph = host.ggml_new_graph_custom(tensors, graph_size, false);
    functions.ggml_build_forward_expand(graph, y);
    ggml_backend *backends[2] = {&backend, cpu.get()};
    void *sched = functions.ggml_backend_sched_new(backends, nullptr, 2, graph_size, false, false);
    functions.ggml_backend_sched_set_tensor_backend(sched, y, &backend);
    const float values[4] = {1, 2, 3, 4};
    if (f->require(functions.ggml_backend_sched_alloc_graph(sched, graph) && x->data && y->data,
                   "the scheduler gives a graph no memory")) {
        std::memcpy(x->data, values, sizeof(values));
        const ggml_status status = functions.ggml_backend_sched_graph_compute(sched, graph);
        const float *result = static_cast<const float *>(y->data);
        f->require(status == status_success && context.computed == 1 && context.optimized == 1 && result[0] == 2 &&
                       result[1] == 4 && result[2] == 6 && result[3] == 8,
                   "the scheduler does not run a graph on a backend with our tables: status " + std::to_string(status) +
                       ", " + std::to_string(context.optimized) + " nodes shown and " +
                       std::to_string(context.computed) + " computed, expected 1");
    }
    functions.ggml_backend_sched_free(sched);
    f->summarize("a graph ran on a backend with our tables");
}

}  // namespace agq
