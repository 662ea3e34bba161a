#include "fake_host.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

host_layout now;
std::string misuse;

constexpr size_t word = 8;
using any_function = void (*)();

}  // namespace

size_t struct_layout::offset(const std::string &name) const {
    size_t at = 0;
    for (const field &f : fields_) {
        at = (at + f.align - 1) / f.align * f.align;
        if (f.name == name) return at;
        at += f.size;
    }
    return absent;
}

size_t struct_layout::size_of(const std::string &name) const {
    for (const field &f : fields_) {
        if (f.name == name) return f.size;
    }
    return 0;
}

size_t struct_layout::end() const {
    size_t at = 0, most = 1;
    for (const field &f : fields_) {
        at = (at + f.align - 1) / f.align * f.align + f.size;
        most = std::max(most, f.align);
    }
    return (at + most - 1) / most * most;
}

namespace {

std::vector<field> functions(const std::vector<std::string> &names) {
    std::vector<field> fields;
    fields.reserve(names.size());
    for (const std::string &name : names) fields.push_back({name, word, word});
    return fields;
}

struct_layout parameters(const std::vector<std::string> &names) {
    std::vector<field> fields;
    fields.reserve(names.size());
    for (const std::string &name : names) fields.push_back({name, 4, 4});
    return struct_layout(fields);
}

/// A field of an object. If this host has no such field, returns a dummy that is never read.
template <class T>
T &at(void *object, const struct_layout &layout, const std::string &name, size_t index = 0) {
    static char nowhere[512];
    std::memset(nowhere, 0, sizeof(nowhere));
    const size_t offset = layout.offset(name);
    if (offset == struct_layout::absent || (index + 1) * sizeof(T) > layout.size_of(name)) {
        return *reinterpret_cast<T *>(nowhere);
    }
    return reinterpret_cast<T *>(static_cast<char *>(object) + offset)[index];
}

/// Calls a slot of a table. A missing or null slot returns null, like a host that checks first.
template <class R = void *, class... Args>
R call(void *table, const struct_layout &layout, const std::string &name, Args... args) {
    void *function = at<void *>(table, layout, name);
    if (!function) return R();
    return reinterpret_cast<R (*)(Args...)>(function)(args...);
}

// ---- tensors ----

struct context {
    char *memory;
    size_t size, used;
    bool no_alloc;
    std::vector<void *> graphs;
};

struct graph {
    std::vector<void *> nodes;
};

std::vector<std::unique_ptr<graph>> all_graphs;

const std::vector<std::string> operations = {
    "NONE", "DUP",  "ADD",     "MUL",     "CONCAT",    "NORM",     "RMS_NORM", "MUL_MAT",        "MUL_MAT_ID",
    "CONT", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "GET_ROWS", "SET_ROWS", "FLASH_ATTN_EXT", "SOFT_MAX",
    "ROPE", "GLU",  "CUSTOM",  "DIV",     "SUM_ROWS",  "CLAMP",    "ARGSORT",  "ADD_ID",         "COUNT"};

int op_number(const std::string &name) {
    const auto found = std::find(operations.begin(), operations.end(), name) - operations.begin();
    const int n = static_cast<int>(found);
    return n == 0 || !now.shuffles_operations ? n : n % (static_cast<int>(operations.size()) - 1) + 1;
}

std::string op_text(int number) {
    for (const std::string &name : operations) {
        if (op_number(name) == number) return name;
    }
    misuse = "the number of an operation is " + std::to_string(number);
    return "";
}

struct type_facts {
    int64_t block;
    size_t bytes;
    bool is_quantized;
};

type_facts facts_of(const std::string &type) {
    static const std::map<std::string, type_facts> known = {
        {"f32", {1, 4, false}}, {"f16", {1, 2, false}}, {"q4_0", {32, 18, true}}, {"q8_0", {32, 34, true}},
        {"i32", {1, 4, false}}, {"i64", {1, 8, false}}, {"bf16", {1, 2, false}},  {"q4_1", {32, 20, true}}};
    const auto found = known.find(type);
    return found == known.end() ? type_facts{0, 0, false} : found->second;
}

char *type_table = nullptr;
size_t type_table_bytes = 0;

char *type_entry(int type) {
    if (type < 0 || type >= static_cast<int>(now.types.size())) {
        misuse = "type " + std::to_string(type) + " is beyond the table";
        type = 0;
    }
    return type_table + static_cast<size_t>(type) * now.traits.size();
}

std::string type_text(int type) {
    return now.types.at(static_cast<size_t>(type));
}

void half_to_float(const void *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint16_t h = static_cast<const uint16_t *>(from)[i];
        const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
        const uint32_t exponent = h >> 10 & 31;
        const uint32_t bits =
            exponent == 0 ? sign : sign | (exponent + 112) << 23 | static_cast<uint32_t>(h & 1023) << 13;
        std::memcpy(&to[i], &bits, sizeof(bits));
    }
}

void float_to_half(const float *, void *to, int64_t n) {
    std::memset(to, 0, static_cast<size_t>(n) * 2);
}

void *new_tensor(context *c, int type, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    const struct_layout &l = now.tensor;
    const size_t bytes = (now.object_bytes + l.size() + 15) / 16 * 16;
    if (c->used + bytes > c->size) {
        misuse = "a context is full";
        std::abort();
    }
    char *t = c->memory + c->used + now.object_bytes;
    c->used += bytes;
    std::memset(t, 0, l.size());
    const int64_t ne[4] = {n0, n1, n2, n3};
    const int64_t block = *reinterpret_cast<int64_t *>(type_entry(type) + now.traits.offset("blck_size"));
    const type_facts facts = facts_of(type_text(type));
    size_t nb = facts.bytes;
    at<int>(t, l, "type") = type;
    for (size_t i = 0; i < 4; ++i) {
        at<int64_t>(t, l, "ne", i) = ne[i];
        at<size_t>(t, l, "nb", i) = nb;
        nb *= static_cast<size_t>(i == 0 && facts.block > 0 ? ne[i] / facts.block : ne[i]);
    }
    (void)block;
    return t;
}

int64_t extent(void *t, size_t i) {
    return at<int64_t>(t, now.tensor, "ne", i);
}

void *new_like(context *c, void *a) {
    return new_tensor(c, 0, extent(a, 0), extent(a, 1), extent(a, 2), extent(a, 3));
}

void *node(void *t, const std::string &op, const std::vector<void *> &sources) {
    at<int>(t, now.tensor, "op") = op_number(op);
    for (size_t i = 0; i < sources.size(); ++i) at<void *>(t, now.tensor, "src", i) = sources[i];
    return t;
}

/// A node whose sources are in this host's order.
void *node(void *t, const std::string &op, const std::vector<std::string> &order,
           const std::map<std::string, void *> &sources) {
    std::vector<void *> in_order;
    for (const std::string &name : order) {
        const auto found = sources.find(name);
        in_order.push_back(found == sources.end() ? nullptr : found->second);
    }
    return node(t, op, in_order);
}

void *view(context *c, void *a, const std::string &op, int64_t n0, int64_t n1, int64_t n2, int64_t n3, size_t offset) {
    void *t = new_tensor(c, at<int>(a, now.tensor, "type"), n0, n1, n2, n3);
    at<void *>(t, now.tensor, "view_src") = a;
    at<size_t>(t, now.tensor, "view_offs") = offset;
    return node(t, op, {a});
}

template <class T>
void set_parameter(void *t, const struct_layout &order, const std::string &name, T value) {
    const size_t offset = order.offset(name), begin = now.tensor.offset("op_params");
    if (offset == struct_layout::absent || begin == struct_layout::absent) return;
    if (offset + sizeof(T) > now.tensor.size_of("op_params")) return;
    std::memcpy(static_cast<char *>(t) + begin + offset, static_cast<const void *>(&value), sizeof(T));
}

template <class T>
T parameter(void *t, const struct_layout &order, const std::string &name) {
    T value = {};
    const size_t offset = order.offset(name), begin = now.tensor.offset("op_params");
    if (offset != struct_layout::absent && begin != struct_layout::absent &&
        offset + sizeof(T) <= now.tensor.size_of("op_params")) {
        std::memcpy(static_cast<void *>(&value), static_cast<char *>(t) + begin + offset, sizeof(T));
    }
    return value;
}

// ---- the CPU's registry, device and backend ----

/// Objects with exactly the size of this host's structs, so that reads past their end are caught.
struct objects {
    std::vector<char *> all;
    char *make(size_t bytes) {
        all.push_back(static_cast<char *>(std::calloc(1, std::max<size_t>(bytes, 1))));
        return all.back();
    }
    void clear() {
        for (char *p : all) std::free(p);
        all.clear();
    }
} heap;

void *cpu_registry = nullptr, *cpu_device = nullptr;
int buffer_type = 0;

const char *cpu_name(void *) {
    return "CPU";
}
const char *cpu_description(void *) {
    return "a fake";
}
void cpu_memory(void *, size_t *free, size_t *total) {
    *free = 111;
    *total = 222;
}
int cpu_type(void *) {
    return now.device_cpu;
}
void cpu_properties(void *device, void *p) {
    const struct_layout &l = now.properties;
    at<const char *>(p, l, "name") = cpu_name(device);
    at<const char *>(p, l, "description") = cpu_description(device);
    at<size_t>(p, l, "memory_free") = 111;
    at<size_t>(p, l, "memory_total") = 222;
    at<int>(p, l, "type") = now.device_cpu;
    at<bool>(p, l, "buffer_from_host_ptr") = true;
    at<bool>(p, l, "mmap_support") = true;
}
void cpu_free(void *) {}

void *compute_one(void *t) {
    const struct_layout &l = now.tensor;
    const int op = at<int>(t, l, "op");
    if (op == op_number("CUSTOM")) {
        using custom_fn = void (*)(void *, int, int, void *);
        const auto function = parameter<custom_fn>(t, now.custom, "function");
        const int ith = now.swaps_thread_numbers ? 1 : 0, nth = 1 - ith;
        if (function) function(t, ith, nth, parameter<void *>(t, now.custom, "userdata"));
    } else if (op == op_number("ADD")) {
        const float *a = static_cast<float *>(at<void *>(at<void *>(t, l, "src", 0), l, "data"));
        const float *b = static_cast<float *>(at<void *>(at<void *>(t, l, "src", 1), l, "data"));
        float *to = static_cast<float *>(at<void *>(t, l, "data"));
        for (int i = 0; a && b && to && i < 4; ++i) to[i] = a[i] + b[i];
    }
    return t;
}

int cpu_compute(void *, graph *g) {
    for (void *t : g->nodes) {
        if (now.runs_unmarked_nodes || at<int>(t, now.tensor, "flags") & now.flag_compute) compute_one(t);
    }
    return now.success;
}

void *cpu_init(void *, const char *) {
    char *backend = heap.make(now.backend.size());
    at<const void *>(backend, now.backend, "guid") = cpu_name(nullptr);
    at<void *>(backend, now.backend, "get_name") = reinterpret_cast<void *>(cpu_name);
    at<void *>(backend, now.backend, "free") = reinterpret_cast<void *>(cpu_free);
    at<void *>(backend, now.backend, "graph_compute") = reinterpret_cast<void *>(cpu_compute);
    at<void *>(backend, now.backend, "device") = cpu_device;
    return backend;
}
void *cpu_buffer_type(void *) {
    return &buffer_type;
}
void *cpu_buffer_from_ptr(void *, void *pointer, size_t, size_t) {
    return pointer;
}
bool yes(void *, void *) {
    return true;
}
void set_threads(void *, int) {}

size_t registry_count(void *) {
    return 1;
}
void *registry_device(void *, size_t) {
    return cpu_device;
}
void *registry_function(void *, const char *name) {
    return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void *>(set_threads) : nullptr;
}

struct scheduler {
    std::vector<void *> backends;
    void *assigned = nullptr;
    std::vector<std::unique_ptr<char[]>> memory;
};

}  // namespace

host_layout declared_layout() {
    host_layout h;
    h.tensor = struct_layout({{"type", 4, 4},
                              {"buffer", 8, 8},
                              {"ne", 32, 8},
                              {"nb", 32, 8},
                              {"op", 4, 4},
                              {"op_params", 64, 4},
                              {"flags", 4, 4},
                              {"src", 80, 8},
                              {"view_src", 8, 8},
                              {"view_offs", 8, 8},
                              {"data", 8, 8},
                              {"name", 64, 1},
                              {"extra", 8, 8},
                              {"padding", 8, 1}});
    h.traits = struct_layout({{"type_name", 8, 8},
                              {"blck_size", 8, 8},
                              {"blck_size_interleave", 8, 8},
                              {"type_size", 8, 8},
                              {"is_quantized", 1, 1},
                              {"to_float", 8, 8},
                              {"from_float_ref", 8, 8}});
    h.properties = struct_layout({{"name", 8, 8},
                                  {"description", 8, 8},
                                  {"memory_free", 8, 8},
                                  {"memory_total", 8, 8},
                                  {"type", 4, 4},
                                  {"device_id", 8, 8},
                                  {"async", 1, 1},
                                  {"host_buffer", 1, 1},
                                  {"buffer_from_host_ptr", 1, 1},
                                  {"events", 1, 1},
                                  {"mmap_support", 1, 1}});
    h.device = struct_layout(
        functions({"get_name", "get_description", "get_memory", "get_type", "get_props", "init_backend",
                   "get_buffer_type", "get_host_buffer_type", "buffer_from_host_ptr", "supports_op", "supports_buft",
                   "offload_op", "event_new", "event_free", "event_synchronize", "reg", "context"}));
    h.backend = struct_layout(
        functions({"guid", "get_name", "free", "set_tensor_async", "get_tensor_async", "set_tensor_2d_async",
                   "get_tensor_2d_async", "cpy_tensor_async", "synchronize", "graph_plan_create", "graph_plan_free",
                   "graph_plan_update", "graph_plan_compute", "graph_compute", "event_record", "event_wait",
                   "graph_optimize", "device", "context"}));
    std::vector<field> registry =
        functions({"get_name", "get_device_count", "get_device", "get_proc_address", "context"});
    registry.insert(registry.begin(), {"api_version", 4, 4});
    h.registry = struct_layout(registry);
    h.custom = struct_layout({{"function", 8, 8}, {"n_tasks", 4, 4}, {"userdata", 8, 8}});
    h.permute = parameters({"axis0", "axis1", "axis2", "axis3"});
    h.concat = parameters({"dim"});
    h.norm = parameters({"eps"});
    h.clamp = parameters({"min", "max"});
    h.argsort = parameters({"order"});
    h.glu = parameters({"unit", "swapped", "alpha", "limit"});
    h.soft_max = parameters({"scale", "max_bias"});
    h.flash_attention = parameters({"scale", "max_bias", "soft_cap"});
    h.rope_sources = {"a", "positions", "factors"};
    h.soft_max_sources = {"a", "mask", "sinks"};
    h.flash_sources = {"q", "k", "v", "mask", "sinks"};
    h.set_rows_sources = {"rows", "indices", "table"};
    h.get_rows_sources = {"table", "indices"};
    h.product_sources = {"weights", "x"};
    h.expert_sources = {"weights", "x", "ids"};
    h.expert_bias_sources = {"a", "b", "ids"};
    h.glu_sources = {"a", "b"};
    h.types.assign(43, "");
    const std::map<int, std::string> known = {{0, "f32"},  {1, "f16"},  {2, "q4_0"}, {3, "q4_1"},
                                              {8, "q8_0"}, {26, "i32"}, {27, "i64"}, {30, "bf16"}};
    for (const auto &[id, name] : known) h.types[static_cast<size_t>(id)] = name;
    return h;
}

void make_host(const host_layout &layout) {
    now = layout;
    misuse.clear();
    heap.clear();
    all_graphs.clear();
    if (type_table) munmap(type_table, type_table_bytes);
    type_table_bytes = (now.types.size() * now.traits.size() / 4096 + 1) * 4096;
    type_table = static_cast<char *>(
        mmap(nullptr, type_table_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    for (size_t i = 0; i < now.types.size(); ++i) {
        char *entry = type_table + i * now.traits.size();
        type_facts facts = facts_of(now.types[i]);
        if (i == 38) facts.block = now.our_slot_block;
        at<const char *>(entry, now.traits, "type_name") = now.types[i].c_str();
        at<int64_t>(entry, now.traits, "blck_size") = facts.block;
        at<size_t>(entry, now.traits, "type_size") = facts.bytes;
        at<bool>(entry, now.traits, "is_quantized") = facts.is_quantized;
        const bool is_half = now.types[i] == "f16";
        at<void *>(entry, now.traits, "to_float") = is_half ? reinterpret_cast<void *>(half_to_float) : nullptr;
        at<void *>(entry, now.traits, "from_float_ref") = is_half ? reinterpret_cast<void *>(float_to_half) : nullptr;
    }
    cpu_registry = heap.make(now.registry.size());
    cpu_device = heap.make(now.device.size());
    const struct {
        const char *name;
        any_function function;
    } device[] = {{"get_name", reinterpret_cast<any_function>(cpu_name)},
                  {"get_description", reinterpret_cast<any_function>(cpu_description)},
                  {"get_memory", reinterpret_cast<any_function>(cpu_memory)},
                  {"get_type", reinterpret_cast<any_function>(cpu_type)},
                  {"get_props", reinterpret_cast<any_function>(cpu_properties)},
                  {"init_backend", reinterpret_cast<any_function>(cpu_init)},
                  {"get_buffer_type", reinterpret_cast<any_function>(cpu_buffer_type)},
                  {"buffer_from_host_ptr", reinterpret_cast<any_function>(cpu_buffer_from_ptr)},
                  {"supports_op", reinterpret_cast<any_function>(yes)},
                  {"supports_buft", reinterpret_cast<any_function>(yes)}};
    for (const auto &slot : device) at<any_function>(cpu_device, now.device, slot.name) = slot.function;
    at<void *>(cpu_device, now.device, "reg") = cpu_registry;
    at<int>(cpu_registry, now.registry, "api_version") = now.api_version;
    at<any_function>(cpu_registry, now.registry, "get_name") = reinterpret_cast<any_function>(cpu_name);
    at<any_function>(cpu_registry, now.registry, "get_device_count") = reinterpret_cast<any_function>(registry_count);
    at<any_function>(cpu_registry, now.registry, "get_device") = reinterpret_cast<any_function>(registry_device);
    at<any_function>(cpu_registry, now.registry, "get_proc_address") =
        reinterpret_cast<any_function>(registry_function);
}

std::string host_misuse() {
    return misuse;
}

// ---- ggml.h ----

EXPORT const char *ggml_version() {
    return now.version.c_str();
}
EXPORT void *ggml_get_type_traits(int type) {
    return type_entry(type);
}
EXPORT const char *ggml_glu_op_name(int unit) {
    return unit == now.swiglu ? "SWIGLU" : unit == now.swiglu_oai ? "SWIGLU_OAI" : "GEGLU";
}
EXPORT const char *ggml_op_name(int op) {
    static std::map<std::string, std::string> kept;
    std::string &name = kept[op_text(op)];
    name = op_text(op);
    return name.c_str();
}
EXPORT const char *ggml_op_desc(void *t) {
    return ggml_op_name(at<int>(t, now.tensor, "op"));
}
EXPORT size_t ggml_tensor_overhead() {
    return now.object_bytes + now.tensor.size();
}
EXPORT size_t ggml_type_size(int type) {
    return at<size_t>(type_entry(type), now.traits, "type_size");
}
EXPORT int64_t ggml_blck_size(int type) {
    return at<int64_t>(type_entry(type), now.traits, "blck_size");
}
EXPORT const char *ggml_type_name(int type) {
    return at<const char *>(type_entry(type), now.traits, "type_name");
}
EXPORT bool ggml_is_quantized(int type) {
    return at<unsigned char>(type_entry(type), now.traits, "is_quantized") != 0;
}
EXPORT size_t ggml_row_size(int type, int64_t n) {
    const int64_t block = ggml_blck_size(type);
    return block == 0 ? 0 : ggml_type_size(type) * static_cast<size_t>(n / block);
}
EXPORT size_t ggml_nbytes(void *t) {
    const type_facts facts = facts_of(type_text(at<int>(t, now.tensor, "type")));
    size_t bytes = facts.bytes;
    for (size_t i = 0; i < 4; ++i) {
        bytes *= static_cast<size_t>(i == 0 && facts.block > 0 ? extent(t, i) / facts.block : extent(t, i));
    }
    return bytes;
}

struct init_params {
    size_t size;
    void *buffer;
    bool no_alloc;
};
EXPORT context *ggml_init(init_params p) {
    if (!now.takes_parameters_of_init_as_is) std::swap(p.no_alloc, (p.buffer = nullptr, p.no_alloc));
    if (!p.buffer) p.buffer = heap.make(p.size);
    return new context{static_cast<char *>(p.buffer), p.size, 0, p.no_alloc, {}};
}
EXPORT void ggml_free(context *c) {
    delete c;
}
EXPORT void *ggml_get_mem_buffer(context *c) {
    return c->memory;
}
EXPORT bool ggml_get_no_alloc(context *c) {
    return c->no_alloc;
}
EXPORT void *ggml_new_tensor_4d(context *c, int type, int64_t n0, int64_t n1, int64_t n2, int64_t n3) {
    return new_tensor(c, type, n0, n1, n2, n3);
}
EXPORT void *ggml_new_tensor_3d(context *c, int type, int64_t n0, int64_t n1, int64_t n2) {
    return new_tensor(c, type, n0, n1, n2, 1);
}
EXPORT void *ggml_set_name(void *t, const char *name) {
    for (size_t i = 0; i <= std::strlen(name); ++i) at<char>(t, now.tensor, "name", i) = name[i];
    return t;
}
EXPORT void ggml_set_input(void *t) {
    at<int>(t, now.tensor, "flags") |= now.flag_input;
}
EXPORT void ggml_set_output(void *t) {
    at<int>(t, now.tensor, "flags") |= now.flag_output;
}
EXPORT void *ggml_view_1d(context *c, void *a, int64_t n0, size_t offset) {
    return view(c, a, "VIEW", n0, 1, 1, 1, offset);
}
EXPORT void *ggml_reshape_2d(context *c, void *a, int64_t n0, int64_t n1) {
    return view(c, a, "RESHAPE", n0, n1, 1, 1, 0);
}
EXPORT void *ggml_transpose(context *c, void *a) {
    return view(c, a, "TRANSPOSE", extent(a, 1), extent(a, 0), extent(a, 2), extent(a, 3), 0);
}
EXPORT void *ggml_permute(context *c, void *a, int axis0, int axis1, int axis2, int axis3) {
    int64_t ne[4];
    const int axes[4] = {axis0, axis1, axis2, axis3};
    for (size_t i = 0; i < 4; ++i) ne[axes[i]] = extent(a, i);
    void *t = view(c, a, "PERMUTE", ne[0], ne[1], ne[2], ne[3], 0);
    for (int i = 0; i < 4; ++i) set_parameter(t, now.permute, "axis" + std::to_string(i), axes[i]);
    return t;
}
EXPORT void *ggml_concat(context *c, void *a, void *b, int dim) {
    void *t = node(new_like(c, a), "CONCAT", {a, b});
    set_parameter(t, now.concat, "dim", dim);
    return t;
}
EXPORT void *ggml_norm(context *c, void *a, float eps) {
    void *t = node(new_like(c, a), "NORM", {a});
    set_parameter(t, now.norm, "eps", eps);
    return t;
}
EXPORT void *ggml_rms_norm(context *c, void *a, float eps) {
    void *t = node(new_like(c, a), "RMS_NORM", {a});
    set_parameter(t, now.norm, "eps", eps);
    return t;
}
EXPORT void *ggml_add(context *c, void *a, void *b) {
    return node(new_like(c, a), "ADD", {a, b});
}
EXPORT void *ggml_mul(context *c, void *a, void *b) {
    return node(new_like(c, a), "MUL", {a, b});
}
EXPORT void *ggml_div(context *c, void *a, void *b) {
    return node(new_like(c, a), "DIV", {a, b});
}
EXPORT void *ggml_sum_rows(context *c, void *a) {
    return node(new_tensor(c, 0, 1, extent(a, 1), extent(a, 2), extent(a, 3)), "SUM_ROWS", {a});
}
EXPORT void *ggml_clamp(context *c, void *a, float min, float max) {
    void *t = node(new_like(c, a), "CLAMP", {a});
    set_parameter(t, now.clamp, "min", min);
    set_parameter(t, now.clamp, "max", max);
    return t;
}
EXPORT void *ggml_argsort(context *c, void *a, int order) {
    void *t = node(new_tensor(c, 26, extent(a, 0), extent(a, 1), extent(a, 2), extent(a, 3)), "ARGSORT", {a});
    set_parameter(t, now.argsort, "order", order);
    return t;
}
EXPORT void *ggml_add_id(context *c, void *a, void *b, void *ids) {
    return node(new_like(c, a), "ADD_ID", now.expert_bias_sources, {{"a", a}, {"b", b}, {"ids", ids}});
}
EXPORT void *ggml_mul_mat(context *c, void *a, void *b) {
    void *t = new_tensor(c, 0, extent(a, 1), extent(b, 1), extent(b, 2), extent(b, 3));
    return node(t, "MUL_MAT", now.product_sources, {{"weights", a}, {"x", b}});
}
EXPORT void *ggml_mul_mat_id(context *c, void *as, void *b, void *ids) {
    void *t = new_tensor(c, 0, extent(as, 1), extent(ids, 0), extent(b, 2), 1);
    return node(t, "MUL_MAT_ID", now.expert_sources, {{"weights", as}, {"x", b}, {"ids", ids}});
}
EXPORT void *ggml_get_rows(context *c, void *a, void *b) {
    void *t = new_tensor(c, 0, extent(a, 0), extent(b, 0), extent(b, 1), extent(b, 2));
    return node(t, "GET_ROWS", now.get_rows_sources, {{"table", a}, {"indices", b}});
}
EXPORT void *ggml_set_rows(context *c, void *a, void *b, void *indices) {
    void *t = view(c, a, "SET_ROWS", extent(a, 0), extent(a, 1), extent(a, 2), extent(a, 3), 0);
    return node(t, "SET_ROWS", now.set_rows_sources, {{"table", a}, {"rows", b}, {"indices", indices}});
}
namespace {
void *gated(context *c, void *a, void *b, int swapped) {
    void *t = new_tensor(c, 0, extent(a, 0), extent(a, 1), extent(a, 2), extent(a, 3));
    node(t, "GLU", now.glu_sources, {{"a", a}, {"b", b}});
    set_parameter(t, now.glu, "unit", now.swiglu);
    set_parameter(t, now.glu, "swapped", swapped);
    return t;
}
}  // namespace
EXPORT void *ggml_swiglu(context *c, void *a) {
    return gated(c, a, nullptr, 0);
}
EXPORT void *ggml_swiglu_swapped(context *c, void *a) {
    return gated(c, a, nullptr, 1);
}
EXPORT void *ggml_swiglu_split(context *c, void *a, void *b) {
    return gated(c, a, b, 0);
}
EXPORT void *ggml_swiglu_oai(context *c, void *a, void *b, float alpha, float limit) {
    void *t = gated(c, a, b, 0);
    set_parameter(t, now.glu, "unit", now.swiglu_oai);
    set_parameter(t, now.glu, "alpha", alpha);
    set_parameter(t, now.glu, "limit", limit);
    return t;
}
EXPORT void *ggml_rope_ext(context *c, void *a, void *b, void *factors, int, int, int, float, float, float, float,
                           float, float) {
    return node(new_like(c, a), "ROPE", now.rope_sources, {{"a", a}, {"positions", b}, {"factors", factors}});
}
EXPORT void *ggml_soft_max_ext(context *c, void *a, void *mask, float scale, float max_bias) {
    void *t = node(new_like(c, a), "SOFT_MAX", now.soft_max_sources, {{"a", a}, {"mask", mask}});
    set_parameter(t, now.soft_max, "scale", scale);
    set_parameter(t, now.soft_max, "max_bias", max_bias);
    return t;
}
namespace {
void add_sinks(void *t, const std::vector<std::string> &order, void *sinks) {
    for (size_t i = 0; i < order.size(); ++i) {
        if (order[i] == "sinks") at<void *>(t, now.tensor, "src", i) = sinks;
    }
}
}  // namespace
EXPORT void ggml_soft_max_add_sinks(void *t, void *sinks) {
    add_sinks(t, now.soft_max_sources, sinks);
}
EXPORT void *ggml_flash_attn_ext(context *c, void *q, void *k, void *v, void *mask, float scale, float max_bias,
                                 float soft_cap) {
    void *t = new_tensor(c, 0, extent(v, 0), extent(q, 2), extent(q, 1), extent(q, 3));
    node(t, "FLASH_ATTN_EXT", now.flash_sources, {{"q", q}, {"k", k}, {"v", v}, {"mask", mask}});
    set_parameter(t, now.flash_attention, "scale", scale);
    set_parameter(t, now.flash_attention, "max_bias", max_bias);
    set_parameter(t, now.flash_attention, "soft_cap", soft_cap);
    return t;
}
EXPORT void ggml_flash_attn_ext_add_sinks(void *t, void *sinks) {
    add_sinks(t, now.flash_sources, sinks);
}
EXPORT void *ggml_custom_4d(context *c, int type, int64_t n0, int64_t n1, int64_t n2, int64_t n3, void **args, int n,
                            void *function, int n_tasks, void *userdata) {
    void *t = node(new_tensor(c, type, n0, n1, n2, n3), "CUSTOM", std::vector<void *>(args, args + n));
    set_parameter(t, now.custom, "function", function);
    set_parameter(t, now.custom, "n_tasks", n_tasks);
    set_parameter(t, now.custom, "userdata", userdata);
    return t;
}
EXPORT graph *ggml_new_graph_custom(context *, size_t, bool) {
    all_graphs.push_back(std::make_unique<graph>());
    return all_graphs.back().get();
}
EXPORT size_t ggml_graph_overhead_custom(size_t, bool) {
    return 64;
}
EXPORT void ggml_graph_add_node(graph *g, void *t) {
    g->nodes.push_back(t);
}
EXPORT void ggml_build_forward_expand(graph *g, void *t) {
    for (size_t i = 0; i < 10; ++i) {
        if (void *source = at<void *>(t, now.tensor, "src", i)) ggml_build_forward_expand(g, source);
    }
    if (at<int>(t, now.tensor, "op") == 0 || std::count(g->nodes.begin(), g->nodes.end(), t)) return;
    at<int>(t, now.tensor, "flags") |= now.flag_compute;
    g->nodes.push_back(t);
}
EXPORT void **ggml_graph_nodes(graph *g) {
    return g->nodes.data();
}
EXPORT int ggml_graph_n_nodes(graph *g) {
    return static_cast<int>(g->nodes.size());
}

// ---- ggml-backend.h ----

EXPORT const char *ggml_backend_reg_name(void *r) {
    return call<const char *>(r, now.registry, "get_name", r);
}
EXPORT size_t ggml_backend_reg_dev_count(void *r) {
    return call<size_t>(r, now.registry, "get_device_count", r);
}
EXPORT void *ggml_backend_reg_dev_get(void *r, size_t i) {
    return call(r, now.registry, "get_device", r, i);
}
EXPORT void *ggml_backend_reg_get_proc_address(void *r, const char *name) {
    return call(r, now.registry, "get_proc_address", r, name);
}
EXPORT void *ggml_backend_reg_by_name(const char *) {
    return nullptr;
}
EXPORT const char *ggml_backend_dev_name(void *d) {
    return call<const char *>(d, now.device, "get_name", d);
}
EXPORT const char *ggml_backend_dev_description(void *d) {
    return call<const char *>(d, now.device, "get_description", d);
}
EXPORT void ggml_backend_dev_memory(void *d, size_t *free, size_t *total) {
    call<void>(d, now.device, "get_memory", d, free, total);
}
EXPORT int ggml_backend_dev_type(void *d) {
    return call<int>(d, now.device, "get_type", d);
}
EXPORT void ggml_backend_dev_get_props(void *d, void *p) {
    std::memset(p, 0, now.properties.size());
    call<void>(d, now.device, "get_props", d, p);
}
EXPORT void *ggml_backend_dev_init(void *d, const char *parameters) {
    return call(d, now.device, "init_backend", d, parameters);
}
EXPORT void *ggml_backend_dev_buffer_type(void *d) {
    return call(d, now.device, "get_buffer_type", d);
}
EXPORT void *ggml_backend_dev_host_buffer_type(void *d) {
    return call(d, now.device, "get_host_buffer_type", d);
}
EXPORT void *ggml_backend_dev_buffer_from_host_ptr(void *d, void *p, size_t size, size_t most) {
    return call(d, now.device, "buffer_from_host_ptr", d, p, size, most);
}
EXPORT bool ggml_backend_dev_supports_op(void *d, void *t) {
    return call<bool>(d, now.device, "supports_op", d, t);
}
EXPORT bool ggml_backend_dev_supports_buft(void *d, void *b) {
    return call<bool>(d, now.device, "supports_buft", d, b);
}
EXPORT bool ggml_backend_dev_offload_op(void *d, void *t) {
    return call<bool>(d, now.device, "offload_op", d, t);
}
EXPORT void *ggml_backend_event_new(void *d) {
    return call(d, now.device, "event_new", d);
}
EXPORT void *ggml_backend_dev_backend_reg(void *d) {
    return at<void *>(d, now.device, "reg");
}
EXPORT void *ggml_backend_dev_by_type(int type) {
    return type == now.device_cpu ? cpu_device : nullptr;
}
EXPORT void *ggml_backend_guid(void *b) {
    return at<void *>(b, now.backend, "guid");
}
EXPORT const char *ggml_backend_name(void *b) {
    return call<const char *>(b, now.backend, "get_name", b);
}
EXPORT void ggml_backend_free(void *b) {
    call<void>(b, now.backend, "free", b);
}
EXPORT void *ggml_backend_get_device(void *b) {
    return at<void *>(b, now.backend, "device");
}
EXPORT void ggml_backend_synchronize(void *b) {
    call<void>(b, now.backend, "synchronize", b);
}
EXPORT void *ggml_backend_graph_plan_create(void *b, graph *g) {
    return call(b, now.backend, "graph_plan_create", b, g);
}
EXPORT int ggml_backend_graph_compute_async(void *b, graph *g) {
    return call<int>(b, now.backend, "graph_compute", b, g);
}
EXPORT int ggml_backend_graph_compute(void *b, graph *g) {
    return ggml_backend_graph_compute_async(b, g);
}
EXPORT void ggml_backend_event_record(void *event, void *b) {
    call<void>(b, now.backend, "event_record", b, event);
}
EXPORT void ggml_backend_event_wait(void *b, void *event) {
    call<void>(b, now.backend, "event_wait", b, event);
}
EXPORT void ggml_backend_buffer_free(void *) {}
EXPORT bool ggml_backend_buffer_is_host(void *) {
    return true;
}
EXPORT int ggml_backend_tensor_alloc(void *buffer, void *t, void *address) {
    at<void *>(t, now.tensor, "buffer") = buffer;
    at<void *>(t, now.tensor, "data") = address;
    return now.success;
}
EXPORT void *ggml_backend_sched_new(void **backends, void **, int n, size_t, bool, bool) {
    scheduler *s = new scheduler;
    s->backends.assign(backends, backends + n);
    return s;
}
EXPORT void ggml_backend_sched_free(scheduler *s) {
    delete s;
}
EXPORT void ggml_backend_sched_set_tensor_backend(scheduler *s, void *, void *backend) {
    s->assigned = backend;
}
EXPORT bool ggml_backend_sched_alloc_graph(scheduler *s, graph *g) {
    const auto give = [s](void *t) {
        void *&data = at<void *>(t, now.tensor, "data");
        if (data) return;
        s->memory.emplace_back(new char[64]());
        data = s->memory.back().get();
    };
    for (void *t : g->nodes) {
        for (size_t i = 0; i < 10; ++i) {
            if (void *source = at<void *>(t, now.tensor, "src", i)) give(source);
        }
        give(t);
    }
    call<void>(s->assigned, now.backend, "graph_optimize", s->assigned, g);
    return true;
}
EXPORT int ggml_backend_sched_graph_compute(scheduler *s, graph *g) {
    return call<int>(s->assigned, now.backend, "graph_compute", s->assigned, g);
}
EXPORT void ggml_threadpool_params_init(void *, int) {}
