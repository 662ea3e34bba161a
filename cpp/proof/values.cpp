// Proves what we read from the host. The host's public functions make tensors and nodes from known values; these must
// be where host.h says.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <iterator>

#include "format/blocks.h"
#include "host/loaded_library.h"
#include "proof/parts.h"

namespace agq {

namespace {

constexpr size_t context_bytes = size_t{160} << 10;  // the proofs use less than a third of it
constexpr size_t alignment = 64;
constexpr size_t object_bytes = 32;  // what ggml puts before a tensor, in all releases

std::string number(int64_t n) {
    return std::to_string(n);
}

/// The byte of a field that may turn out not to be a bool.
int raw_bool(const void *address) {
    return *static_cast<const unsigned char *>(address);
}

}  // namespace

tensor_memory::tensor_memory() : bytes_(new char[context_bytes + alignment]()) {
    begin_ = bytes_.get() + (alignment - reinterpret_cast<uintptr_t>(bytes_.get()) % alignment) % alignment;
    context_ = host.ggml_init({context_bytes, begin_, true});
}

tensor_memory::~tensor_memory() {
    if (context_) host.ggml_free(context_);
}

ggml_context *tensor_memory::context(findings *f) const {
    return f->require(
               context_ && functions.ggml_get_mem_buffer(context_) == begin_ && functions.ggml_get_no_alloc(context_),
               "ggml_init takes other parameters than expected")
               ? context_
               : nullptr;
}

bool tensor_memory::holds(findings *f, const ggml_tensor *t) const {
    const char *address = reinterpret_cast<const char *>(t);
    return f->require(address >= begin_ && address <= begin_ + context_bytes - sizeof(*t) &&
                          reinterpret_cast<uintptr_t>(t) % alignof(ggml_tensor) == 0,
                      "a new tensor is not in the memory of its context");
}

one_thread_cpu::one_thread_cpu() : backend_(host.ggml_backend_dev_init(host.cpu, nullptr)) {
    using set_n_threads_fn = void (*)(ggml_backend *, int);
    const auto set = reinterpret_cast<set_n_threads_fn>(cpu_function("ggml_backend_set_n_threads"));
    if (backend_ && set) set(backend_, 1);
}

one_thread_cpu::~one_thread_cpu() {
    if (backend_) host.ggml_backend_free(backend_);
}

void prove_type_table(findings *f) {
    const struct {
        int id;
        const char *name;
        int64_t block;
        size_t bytes;
        bool is_quantized;
    } known[] = {{ggml_type_f32, "f32", 1, 4, false},    {ggml_type_f16, "f16", 1, 2, false},
                 {ggml_type_q4_0, "q4_0", 32, 18, true}, {ggml_type_q8_0, "q8_0", 32, 34, true},
                 {ggml_type_i32, "i32", 1, 4, false},    {ggml_type_i64, "i64", 1, 8, false},
                 {ggml_type_bf16, "bf16", 1, 2, false}};
    const char *table = reinterpret_cast<const char *>(host.ggml_get_type_traits(0));
    for (const int id : {1, 2, ggml_type_id}) {
        const char *entry = reinterpret_cast<const char *>(host.ggml_get_type_traits(id));
        f->require(entry - table == id * static_cast<ptrdiff_t>(sizeof(ggml_type_traits)),
                   "an entry of the type table does not take " + number(sizeof(ggml_type_traits)) + " bytes");
    }
    if (!f->good()) return;
    for (const auto &t : known) {
        const ggml_type_traits *entry = host.ggml_get_type_traits(t.id);
        const char *name = functions.ggml_type_name(t.id);
        if (!f->require(name && std::strcmp(name, t.name) == 0,
                        "type " + number(t.id) + " is '" + (name ? name : "?") + "', expected '" + t.name + "'") ||
            !f->require(functions.ggml_blck_size(t.id) == t.block && functions.ggml_type_size(t.id) == t.bytes,
                        std::string(name) + " has blocks of " + number(functions.ggml_blck_size(t.id)) + " values in " +
                            number(static_cast<int64_t>(functions.ggml_type_size(t.id))) + " bytes, expected " +
                            number(t.block) + " in " + number(static_cast<int64_t>(t.bytes))) ||
            !f->require(entry->type_name == name && entry->blck_size == t.block && entry->type_size == t.bytes &&
                            raw_bool(&entry->is_quantized) == t.is_quantized &&
                            functions.ggml_is_quantized(t.id) == t.is_quantized,
                        "the type table's entry of " + std::string(name) + " has other fields than expected")) {
            return;
        }
    }
    using to_float_fn = void (*)(const void *, float *, int64_t);
    const void *to_float = host.ggml_get_type_traits(ggml_type_f16)->to_float;
    const void *library = library_base(reinterpret_cast<const void *>(host.ggml_get_type_traits));
    if (!f->require(to_float && library_base(to_float) == library, "binary16 has no conversion to float")) return;
    alignas(64) uint16_t halves[64] = {0x3C00, 0xC000, 0x3800, 0x4900};
    alignas(64) float floats[64] = {};
    reinterpret_cast<to_float_fn>(const_cast<void *>(to_float))(halves, floats, 4);
    f->require(floats[0] == 1 && floats[1] == -2 && floats[2] == 0.5f && floats[3] == 10,
               "the conversion of binary16 to float is another function");
    const ggml_type_traits *ours = host.ggml_get_type_traits(ggml_type_id);
    f->require(ours->blck_size == functions.ggml_blck_size(ggml_type_id) &&
                   ours->type_size == functions.ggml_type_size(ggml_type_id),
               "slot " + number(ggml_type_id) + " of the type table has other fields than expected");
    f->summarize(number(std::size(known)) + " known types; slot " + number(ggml_type_id) + " has blocks of " +
                 number(ours->blck_size));
}

void prove_tensor(findings *f) {
    f->require(host.ggml_tensor_overhead() == object_bytes + sizeof(ggml_tensor),
               "a tensor takes " + number(static_cast<int64_t>(host.ggml_tensor_overhead())) + " bytes, expected " +
                   number(object_bytes + sizeof(ggml_tensor)));
    tensor_memory memory;
    ggml_context *context = f->good() ? memory.context(f) : nullptr;
    if (!context) return;
    ggml_tensor *a = host.ggml_new_tensor_3d(context, ggml_type_q4_0, 64, 5, 7);
    ggml_tensor *b = functions.ggml_new_tensor_4d(context, ggml_type_f16, 11, 2, 3, 13);
    ggml_tensor *view = functions.ggml_view_1d(context, b, 4, 6);
    ggml_tensor *named = host.ggml_new_tensor_3d(context, ggml_type_f32, 4, 1, 1);
    ggml_tensor *plain = host.ggml_new_tensor_3d(context, ggml_type_f32, 4, 1, 1);
    for (const ggml_tensor *t : {a, b, view, named, plain}) {
        if (!memory.holds(f, t)) return;
    }
    const auto is = [f](bool condition, const char *field) {
        return f->require(condition, std::string("a tensor has its ") + field + " in another place than expected");
    };
    const auto has_shape = [](const ggml_tensor *t, std::initializer_list<int64_t> ne,
                              std::initializer_list<size_t> nb) {
        return std::equal(ne.begin(), ne.end(), t->ne) && std::equal(nb.begin(), nb.end(), t->nb);
    };
    const auto is_blank = [](const ggml_tensor *t) {
        return std::all_of(t->src, t->src + ggml_max_src, [](const ggml_tensor *s) { return !s; }) && !t->data &&
               !t->buffer && t->flags == 0 && t->name[0] == 0;
    };
    is(a->type == ggml_type_q4_0 && b->type == ggml_type_f16, "type");
    is(has_shape(a, {64, 5, 7, 1}, {18, 36, 180, 1260}) && has_shape(b, {11, 2, 3, 13}, {2, 22, 44, 132}), "shape");
    is(host.ggml_nbytes(a) == 1260 && host.ggml_nbytes(b) == 1716, "size");
    is(is_blank(a) && is_blank(b) && !a->view_src && !b->view_src, "initial state");
    is(view->view_src == b && view->view_offs == 6 && view->ne[0] == 4, "view");

    functions.ggml_set_name(named, "agq-probe");
    is(std::memcmp(named->name, "agq-probe", sizeof("agq-probe")) == 0, "name");
    functions.ggml_set_input(named);
    is(named->flags == ggml_flag_input, "flag of an input");
    functions.ggml_set_output(named);
    is(named->flags == (ggml_flag_input | ggml_flag_output), "flag of an output");

    alignas(128) static char data[256];
    ggml_backend_buffer *buffer =
        host.ggml_backend_dev_buffer_from_host_ptr(host.cpu, data, sizeof(data), sizeof(data));
    if (is(buffer, "memory")) {
        is(functions.ggml_backend_buffer_is_host(buffer) &&
               functions.ggml_backend_tensor_alloc(buffer, plain, data + 128) == status_success &&
               plain->data == data + 128 && plain->buffer == buffer,
           "data or buffer");
        functions.ggml_backend_buffer_free(buffer);
    }
    if (!f->good()) return;

    // To prove where the operation number is, copy it from one tensor to another. The host must then take the second
    // for a node of that operation. If the number is elsewhere, the host still sees the second tensor's own.
    ggml_tensor *product = functions.ggml_mul_mat(context, named, plain);
    ggml_tensor *sources[ggml_max_src - 1];
    for (ggml_tensor *&s : sources) s = host.ggml_new_tensor_3d(context, ggml_type_f32, 1, 1, 1);
    ggml_tensor *custom = host.ggml_custom_4d(context, ggml_type_f32, 2, 3, 4, 5, sources,
                                              static_cast<int>(std::size(sources)), nullptr, 1, nullptr);
    if (!memory.holds(f, product) || !memory.holds(f, custom)) return;
    ggml_tensor *leaf = host.ggml_new_tensor_3d(context, ggml_type_f32, 4, 1, 1);
    if (!memory.holds(f, leaf)) return;
    const char *none = host.ggml_op_desc(leaf);
    host.op_none = leaf->op;
    leaf->op = product->op;
    const char *carried = host.ggml_op_desc(leaf);
    is(none && carried && std::strcmp(none, "NONE") == 0 && std::strcmp(carried, "MUL_MAT") == 0, "operation");
    is(std::equal(std::begin(sources), std::end(sources), custom->src) && !custom->src[ggml_max_src - 1] &&
           product->src[0] == named && product->src[1] == plain && !product->src[2],
       "sources");
    f->summarize(number(sizeof(ggml_tensor)) + " bytes, all fields in their places");
}

namespace {

/// Checks nodes that the host's constructors made.
class node_checks {
  public:
    node_checks(findings *f, const tensor_memory &memory) : f_(f), memory_(memory) {}

    /// Whether the node has this operation and these sources. Stores the operation's number in `*op`.
    bool is(const ggml_tensor *node, const char *name, int *op, std::initializer_list<const ggml_tensor *> sources) {
        if (!f_->good() || !memory_.holds(f_, node)) return false;
        const char *found = host.ggml_op_name(node->op);
        if (!f_->require(found && std::strcmp(found, name) == 0,
                         std::string("an operation is called ") + (found ? found : "?") + ", expected " + name)) {
            return false;
        }
        *op = node->op;
        return f_->require(std::equal(sources.begin(), sources.end(), node->src) &&
                               std::all_of(node->src + sources.size(), node->src + ggml_max_src,
                                           [](const ggml_tensor *s) { return !s; }),
                           std::string(name) + " has other sources than expected");
    }

    /// Whether the node's parameters begin with these values.
    template <class value>
    bool has(const ggml_tensor *node, std::initializer_list<value> params) {
        static_assert(sizeof(value) == sizeof(int32_t));
        return f_->require(std::memcmp(node->op_params, params.begin(), params.size() * sizeof(value)) == 0,
                           std::string(host.ggml_op_name(node->op)) + " has other parameters than expected");
    }

    bool has_shape(const ggml_tensor *node, std::initializer_list<int64_t> ne) {
        return f_->require(std::equal(ne.begin(), ne.end(), node->ne),
                           std::string(host.ggml_op_name(node->op)) + " has another shape than expected");
    }

  private:
    findings *f_;
    const tensor_memory &memory_;
};

void no_function(ggml_tensor *, int, int, void *) {}

}  // namespace

void prove_operations(findings *f) {
    tensor_memory memory;
    ggml_context *c = memory.context(f);
    if (!c) return;
    const auto tensor = [c](int type, int64_t n0, int64_t n1 = 1, int64_t n2 = 1) {
        return host.ggml_new_tensor_3d(c, type, n0, n1, n2);
    };
    const auto floats = [&](int64_t n0, int64_t n1 = 1, int64_t n2 = 1) { return tensor(ggml_type_f32, n0, n1, n2); };
    node_checks check(f, memory);
    ggml_tensor *x = floats(64, 3, 4), *y = floats(64, 3, 4), *n = nullptr;
    int ignored = -1;

    const bool shapes_and_rows =
        check.is(n = functions.ggml_view_1d(c, x, 8, 0), "VIEW", &host.op_view, {x}) &&
        check.is(functions.ggml_reshape_2d(c, x, 192, 4), "RESHAPE", &host.op_reshape, {x}) &&
        check.is(functions.ggml_transpose(c, x), "TRANSPOSE", &host.op_transpose, {x}) &&
        check.is(n = functions.ggml_permute(c, x, 1, 2, 0, 3), "PERMUTE", &host.op_permute, {x}) &&
        check.has<int32_t>(n, {1, 2, 0, 3}) && check.has_shape(n, {4, 64, 3, 1}) &&
        check.is(n = functions.ggml_concat(c, x, y, 2), "CONCAT", &ignored, {x, y}) && check.has<int32_t>(n, {2}) &&
        check.is(functions.ggml_add(c, x, y), "ADD", &host.op_add, {x, y}) &&
        check.is(functions.ggml_mul(c, y, x), "MUL", &host.op_mul, {y, x}) &&
        check.is(functions.ggml_div(c, x, y), "DIV", &host.op_div, {x, y}) &&
        check.is(n = functions.ggml_sum_rows(c, x), "SUM_ROWS", &host.op_sum_rows, {x}) &&
        check.has_shape(n, {1, 3, 4, 1}) &&
        check.is(n = functions.ggml_clamp(c, x, 0.5f, 3.0f), "CLAMP", &host.op_clamp, {x}) &&
        check.has<float>(n, {0.5f, 3.0f}) &&
        check.is(n = functions.ggml_argsort(c, x, 1), "ARGSORT", &host.op_argsort, {x}) && check.has<int32_t>(n, {1}) &&
        f->require(n->type == ggml_type_i32, "ARGSORT gives another type than expected") &&
        check.is(n = functions.ggml_norm(c, x, 0.25f), "NORM", &host.op_norm, {x}) && check.has<float>(n, {0.25f}) &&
        check.is(n = functions.ggml_rms_norm(c, x, 0.125f), "RMS_NORM", &host.op_rms_norm, {x}) &&
        check.has<float>(n, {0.125f});
    if (!shapes_and_rows) return;

    const int swiglu = 2;
    const auto is_swiglu = [&](const ggml_tensor *node, std::initializer_list<const ggml_tensor *> sources,
                               int32_t swapped) {
        return check.is(node, "GLU", &host.op_glu, sources) && check.has<int32_t>(node, {swiglu, swapped});
    };
    const char *unit = host.ggml_glu_op_name(swiglu);
    if (!f->require(unit && std::strcmp(unit, "SWIGLU") == 0, "gated unit 2 is not SWIGLU") ||
        !is_swiglu(functions.ggml_swiglu(c, x), {x}, 0) || !is_swiglu(functions.ggml_swiglu_swapped(c, x), {x}, 1) ||
        !is_swiglu(functions.ggml_swiglu_split(c, x, y), {x, y}, 0)) {
        return;
    }
    host.glu_swiglu = swiglu;
    const int swiglu_oai = 3;
    unit = host.ggml_glu_op_name(swiglu_oai);
    n = functions.ggml_swiglu_oai(c, x, y, 1.5f, 7.0f);
    float limits[2] = {};
    if (!f->require(unit && std::strcmp(unit, "SWIGLU_OAI") == 0, "gated unit 3 is not SWIGLU_OAI") ||
        !check.is(n, "GLU", &host.op_glu, {x, y}) || !check.has<int32_t>(n, {swiglu_oai, 0})) {
        return;
    }
    std::memcpy(limits, n->op_params + 2, sizeof(limits));
    if (!f->require(limits[0] == 1.5f && limits[1] == 7.0f, "SWIGLU_OAI has other parameters than expected")) return;
    host.glu_swiglu_oai = swiglu_oai;

    ggml_tensor *table = tensor(ggml_type_f16, 64, 16), *three = tensor(ggml_type_i32, 3);
    ggml_tensor *cells = tensor(ggml_type_i64, 3), *stored = floats(64, 3);
    ggml_tensor *weights = tensor(ggml_type_f16, 64, 32), *experts = tensor(ggml_type_f16, 64, 32, 4);
    ggml_tensor *routed = floats(64, 1, 3), *chosen = tensor(ggml_type_i32, 2, 3);
    ggml_tensor *biases = floats(32, 4);
    const bool products =
        check.is(n = functions.ggml_get_rows(c, table, three), "GET_ROWS", &host.op_get_rows, {table, three}) &&
        check.has_shape(n, {64, 3, 1, 1}) &&
        check.is(n = functions.ggml_set_rows(c, table, stored, cells), "SET_ROWS", &host.op_set_rows,
                 {stored, cells, table}) &&
        f->require(n->view_src == table, "SET_ROWS is no view of what it writes to") &&
        check.is(n = functions.ggml_mul_mat(c, weights, stored), "MUL_MAT", &host.op_mul_mat, {weights, stored}) &&
        check.has_shape(n, {32, 3, 1, 1}) &&
        check.is(n = functions.ggml_mul_mat_id(c, experts, routed, chosen), "MUL_MAT_ID", &host.op_mul_mat_id,
                 {experts, routed, chosen}) &&
        check.has_shape(n, {32, 2, 3, 1}) &&
        check.is(functions.ggml_add_id(c, n, biases, chosen), "ADD_ID", &host.op_add_id, {n, biases, chosen});
    if (!products) return;

    ggml_tensor *heads = floats(8, 4, 3), *factors = floats(4);
    ggml_tensor *rope = functions.ggml_rope_ext(c, heads, three, factors, 8, 0, 128, 1e4f, 1, 0, 1, 32, 1);
    if (!check.is(rope, "ROPE", &host.op_rope, {heads, three, factors})) return;

    ggml_tensor *scores = floats(16, 3, 4), *mask = tensor(ggml_type_f16, 16, 64), *sinks = floats(4);
    ggml_tensor *soft_max = functions.ggml_soft_max_ext(c, scores, mask, 0.25f, 8.0f);
    if (!check.is(soft_max, "SOFT_MAX", &host.op_soft_max, {scores, mask}) ||
        !check.has<float>(soft_max, {0.25f, 8.0f})) {
        return;
    }
    functions.ggml_soft_max_add_sinks(soft_max, sinks);
    if (!check.is(soft_max, "SOFT_MAX", &host.op_soft_max, {scores, mask, sinks})) return;

    ggml_tensor *q = floats(64, 3, 4), *k = tensor(ggml_type_f16, 64, 16, 2), *v = tensor(ggml_type_f16, 32, 16, 2);
    ggml_tensor *flash = functions.ggml_flash_attn_ext(c, q, k, v, mask, 0.25f, 8.0f, 30.0f);
    if (!check.is(flash, "FLASH_ATTN_EXT", &host.op_flash_attn_ext, {q, k, v, mask}) ||
        !check.has<float>(flash, {0.25f, 8.0f, 30.0f}) || !check.has_shape(flash, {32, 4, 3, 1})) {
        return;
    }
    functions.ggml_flash_attn_ext_add_sinks(flash, sinks);
    if (!check.is(flash, "FLASH_ATTN_EXT", &host.op_flash_attn_ext, {q, k, v, mask, sinks})) return;

    int marker = 0;
    ggml_tensor *args[2] = {x, y};
    ggml_tensor *custom =
        host.ggml_custom_4d(c, ggml_type_f32, 2, 3, 4, 5, args, 2, no_function, ggml_n_tasks_max, &marker);
    if (!check.is(custom, "CUSTOM", &host.op_custom, {x, y})) return;
    ggml_custom_params params;
    std::memcpy(&params, custom->op_params, sizeof(params));
    f->require(params.function == no_function && params.n_tasks == ggml_n_tasks_max && params.userdata == &marker,
               "CUSTOM has other parameters than expected");
    f->summarize("sources and parameters of 23 operations in their places");
}

namespace {

struct probe_run {
    int calls = 0, ith = -1, nth = -1;
    const ggml_tensor *node = nullptr;
};

/// Computes 2 x + 1.
void probe_node(ggml_tensor *dst, int ith, int nth, void *userdata) {
    probe_run &run = *static_cast<probe_run *>(userdata);
    ++run.calls;
    run.ith = ith;
    run.nth = nth;
    run.node = dst;
    const float *x = static_cast<const float *>(dst->src[0]->data);
    for (int i = 0; i < 4; ++i) static_cast<float *>(dst->data)[i] = 2 * x[i] + 1;
}

}  // namespace

void prove_graph(findings *f) {
    tensor_memory memory;
    ggml_context *context = memory.context(f);
    one_thread_cpu cpu;
    if (!f->require(cpu.get(), "the CPU device makes no backend") || !context) return;
    alignas(64) float values[3][16] = {{1, 2, 3, 4}, {}, {9, 9, 9, 9}};
    probe_run run;
    ggml_tensor *x = host.ggml_new_tensor_3d(context, ggml_type_f32, 4, 1, 1);
    ggml_tensor *custom = host.ggml_custom_4d(context, ggml_type_f32, 4, 1, 1, 1, &x, 1, probe_node, 1, &run);
    ggml_tensor *sum = functions.ggml_add(context, custom, x);
    ggml_tensor *last = functions.ggml_add(context, custom, sum);
    for (ggml_tensor *t : {x, custom, sum, last}) {
        if (!memory.holds(f, t)) return;
    }
    x->data = values[0], custom->data = last->data = values[1], sum->data = values[2];

    // The host marks the nodes to compute.
    ggml_cgraph *theirs = host.ggml_new_graph_custom(context, 8, false);
    functions.ggml_build_forward_expand(theirs, sum);
    ggml_tensor **nodes = host.ggml_graph_nodes(theirs);
    if (!f->require(host.ggml_graph_n_nodes(theirs) == 2 && nodes[0] == custom && nodes[1] == sum,
                    "a graph does not hold its nodes in the order in which they are computed") ||
        !f->require(is_computed(custom) && is_computed(sum) && !is_computed(last),
                    "nodes that are to be computed have another mark than expected")) {
        return;
    }
    // Like the plugin: add nodes one by one. The unmarked one must not run; it would overwrite an input of the next.
    ggml_cgraph *ours = host.ggml_new_graph_custom(context, 8, false);
    for (ggml_tensor *t : {custom, last, sum}) host.ggml_graph_add_node(ours, t);
    const ggml_status status = host.ggml_backend_graph_compute(cpu.get(), ours);
    const float expected[4] = {4, 7, 10, 13};
    f->require(host.ggml_graph_n_nodes(ours) == 3 && status == status_success && run.calls == 1 && run.ith == 0 &&
                   run.nth == 1 && run.node == custom && std::equal(expected, expected + 4, values[2]),
               "a custom node gives another result than expected: status " + number(status) + ", " + number(run.calls) +
                   " calls");
    f->summarize("a custom node ran on the CPU backend");
}

void prove_known_type(findings *f) {
    const char *name = functions.ggml_type_name(ggml_type_id);
    f->require(name && std::strcmp(name, "agq4") == 0 && functions.ggml_is_quantized(ggml_type_id) &&
                   functions.ggml_blck_size(ggml_type_id) == ggml_block_size &&
                   functions.ggml_type_size(ggml_type_id) == ggml_block_bytes &&
                   functions.ggml_row_size(ggml_type_id, 3 * ggml_block_size) == 3 * ggml_block_bytes,
               "the host does not know the type after its registration");
    f->summarize("type " + number(ggml_type_id) + " is agq4");
}

}  // namespace agq
