// The part of ggml's ABI that the plugin uses. It is declared here, so the plugin builds without ggml's headers, and
// one build serves all ggml releases from the oldest in tested_hosts.h on. Functions are looked up at load time;
// abi_proof.cpp checks that the running host matches these declarations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "host/loaded_library.h"

namespace agq {

// ---- public structs of ggml.h ----

struct ggml_context;
struct ggml_cgraph;
struct ggml_backend_buffer;
struct ggml_backend_buffer_type;
struct ggml_backend;
struct ggml_backend_device;
struct ggml_backend_reg;

struct ggml_tensor {
    int type;
    ggml_backend_buffer *buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    ggml_tensor *src[10];
    ggml_tensor *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;
    char padding[8];
};

struct ggml_init_params {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
};

struct ggml_type_traits {
    const char *type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void *to_float;
    void *from_float_ref;
};

struct ggml_backend_feature {
    const char *name;
    const char *value;
};

using ggml_custom_op = void (*)(ggml_tensor *dst, int ith, int nth, void *userdata);
/// What ggml keeps in `op_params` of a CUSTOM node.
struct ggml_custom_params {
    ggml_custom_op function;
    int n_tasks;
    void *userdata;
};
using ggml_log_callback = void (*)(int level, const char *text, void *user_data);
using ggml_abort_callback = bool (*)(void *data);

constexpr int ggml_type_f32 = 0;
constexpr int ggml_type_f16 = 1;
constexpr int ggml_type_i32 = 26;
constexpr int ggml_type_i64 = 27;
constexpr int ggml_type_bf16 = 30;
constexpr int ggml_type_q4_0 = 2;
constexpr int ggml_type_q8_0 = 8;
constexpr int ggml_flag_input = 1;
constexpr int ggml_flag_output = 2;
constexpr int ggml_flag_compute = 16;
constexpr int ggml_n_tasks_max = -1;
constexpr int ggml_max_src = 10;

enum ggml_status { status_alloc_failed = -2, status_failed = -1, status_success = 0, status_aborted = 1 };
enum ggml_log_level { log_info = 2, log_warn = 3, log_error = 4 };
enum ggml_device_type { device_cpu = 0, device_accel = 3 };

// ---- private tables of ggml-backend-impl.h ----

/// Versions of these tables that the plugin supports. Version 3 changed only the table of buffer types, which is not
/// declared here.
constexpr int oldest_api_version = 2, newest_api_version = 3;

struct ggml_backend_dev_caps {
    bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
};

struct ggml_backend_dev_props {
    const char *name;
    const char *description;
    size_t memory_free, memory_total;
    int type;
    const char *device_id;
    ggml_backend_dev_caps caps;
};

using unused_fn = void (*)();

struct ggml_backend_i {
    const char *(*get_name)(ggml_backend *);
    void (*free)(ggml_backend *);
    unused_fn set_tensor_async, get_tensor_async, set_tensor_2d_async, get_tensor_2d_async, cpy_tensor_async,
        synchronize;
    unused_fn graph_plan_create, graph_plan_free, graph_plan_update, graph_plan_compute;
    ggml_status (*graph_compute)(ggml_backend *, ggml_cgraph *);
    unused_fn event_record, event_wait;
    /// The parameters after the second differ between releases. All calling conventions in use let a callee ignore
    /// them.
    void (*graph_optimize)(ggml_backend *, ggml_cgraph *);
};

struct ggml_backend {
    uint8_t (*guid)[16];
    ggml_backend_i iface;
    ggml_backend_device *device;
    void *context;
};

struct ggml_backend_device_i {
    const char *(*get_name)(ggml_backend_device *);
    const char *(*get_description)(ggml_backend_device *);
    void (*get_memory)(ggml_backend_device *, size_t *free, size_t *total);
    int (*get_type)(ggml_backend_device *);
    void (*get_props)(ggml_backend_device *, ggml_backend_dev_props *);
    ggml_backend *(*init_backend)(ggml_backend_device *, const char *params);
    ggml_backend_buffer_type *(*get_buffer_type)(ggml_backend_device *);
    ggml_backend_buffer_type *(*get_host_buffer_type)(ggml_backend_device *);
    ggml_backend_buffer *(*buffer_from_host_ptr)(ggml_backend_device *, void *, size_t, size_t);
    bool (*supports_op)(ggml_backend_device *, const ggml_tensor *);
    bool (*supports_buft)(ggml_backend_device *, ggml_backend_buffer_type *);
    bool (*offload_op)(ggml_backend_device *, const ggml_tensor *);
    unused_fn event_new, event_free, event_synchronize;
};

struct ggml_backend_device {
    ggml_backend_device_i iface;
    ggml_backend_reg *reg;
    void *context;
};

struct ggml_backend_reg_i {
    const char *(*get_name)(ggml_backend_reg *);
    size_t (*get_device_count)(ggml_backend_reg *);
    ggml_backend_device *(*get_device)(ggml_backend_reg *, size_t index);
    void *(*get_proc_address)(ggml_backend_reg *, const char *name);
};

struct ggml_backend_reg {
    int api_version;
    ggml_backend_reg_i iface;
    void *context;
};

// ---- functions, looked up by name in the libraries that are already loaded ----

// X(return type, name, parameters); all of them live in libggml-base or libggml.
#define AGQ_HOST_FUNCTIONS(X)                                                                                        \
    X(const char *, ggml_version, ())                                                                                \
    X(const ggml_type_traits *, ggml_get_type_traits, (int))                                                         \
    X(const char *, ggml_glu_op_name, (int))                                                                         \
    X(const char *, ggml_op_name, (int))                                                                             \
    X(const char *, ggml_op_desc, (const ggml_tensor *))                                                             \
    X(size_t, ggml_tensor_overhead, ())                                                                              \
    X(size_t, ggml_nbytes, (const ggml_tensor *))                                                                    \
    X(ggml_context *, ggml_init, (ggml_init_params))                                                                 \
    X(void, ggml_free, (ggml_context *))                                                                             \
    X(ggml_tensor *, ggml_new_tensor_3d, (ggml_context *, int, int64_t, int64_t, int64_t))                           \
    X(ggml_tensor *, ggml_custom_4d,                                                                                 \
      (ggml_context *, int, int64_t, int64_t, int64_t, int64_t, ggml_tensor **, int, ggml_custom_op, int, void *))   \
    X(ggml_cgraph *, ggml_new_graph_custom, (ggml_context *, size_t, bool))                                          \
    X(size_t, ggml_graph_overhead_custom, (size_t, bool))                                                            \
    X(void, ggml_graph_add_node, (ggml_cgraph *, ggml_tensor *))                                                     \
    X(ggml_tensor **, ggml_graph_nodes, (ggml_cgraph *))                                                             \
    X(int, ggml_graph_n_nodes, (ggml_cgraph *))                                                                      \
    X(ggml_status, ggml_backend_graph_compute, (ggml_backend *, ggml_cgraph *))                                      \
    X(void, ggml_backend_free, (ggml_backend *))                                                                     \
    X(ggml_backend_device *, ggml_backend_dev_by_type, (int))                                                        \
    X(ggml_backend *, ggml_backend_dev_init, (ggml_backend_device *, const char *))                                  \
    X(ggml_backend_buffer_type *, ggml_backend_dev_buffer_type, (ggml_backend_device *))                             \
    X(ggml_backend_buffer *, ggml_backend_dev_buffer_from_host_ptr, (ggml_backend_device *, void *, size_t, size_t)) \
    X(bool, ggml_backend_dev_supports_op, (ggml_backend_device *, const ggml_tensor *))                              \
    X(bool, ggml_backend_dev_supports_buft, (ggml_backend_device *, ggml_backend_buffer_type *))                     \
    X(void, ggml_backend_dev_memory, (ggml_backend_device *, size_t *, size_t *))                                    \
    X(ggml_backend_reg *, ggml_backend_dev_backend_reg, (ggml_backend_device *))                                     \
    X(void *, ggml_backend_reg_get_proc_address, (ggml_backend_reg *, const char *))                                 \
    X(ggml_backend_reg *, ggml_backend_reg_by_name, (const char *))                                                  \
    X(void, ggml_threadpool_params_init, (void *, int))

/// What the plugin knows about the program that loaded it.
struct host_api {
#define AGQ_DECLARE(result, name, parameters) result(*name) parameters = nullptr;
    AGQ_HOST_FUNCTIONS(AGQ_DECLARE)
#undef AGQ_DECLARE

    /// Numbers of the operations that the plugin looks at. They differ between releases, because ggml inserts new ones
    /// into its enum.
    int op_none = -1, op_mul_mat = -1, op_mul_mat_id = -1, op_get_rows = -1, op_set_rows = -1, op_soft_max = -1,
        op_flash_attn_ext = -1, op_custom = -1, op_view = -1, op_reshape = -1, op_permute = -1, op_transpose = -1,
        op_norm = -1, op_rms_norm = -1, op_rope = -1, op_mul = -1, op_add = -1, op_add_id = -1, op_glu = -1,
        op_argsort = -1, op_sum_rows = -1, op_clamp = -1, op_div = -1;
    int glu_swiglu = -1;      ///< number of the gated unit with SiLU, -1 if this host's differs
    int glu_swiglu_oai = -1;  ///< the same of gpt-oss's unit with limits

    ggml_backend_device *cpu = nullptr;  ///< the device that runs everything that is not ours
    bool openmp = false;                 ///< whether the CPU backend uses OpenMP threads
    int api_version = 0;                 ///< of the backend tables; our registry must report the same
    void (*ggml_log_get)(ggml_log_callback *, void **) = nullptr;  ///< null in a host that does not offer it
};

/// The one host of this process; valid after `connect_host` returned true.
extern host_api host;

/// Finds the host's functions and its CPU device. May be called again for the same host. On failure `*error` says what
/// was found, what was expected and what to do.
bool connect_host(const loaded_library &library, std::string *error);

/// Whether this host's ggml is newer than all tested versions.
bool is_untested_host();

/// The end of an error message about a host that cannot be used: what to do.
std::string advice();

/// Whether the operation does nothing when a graph runs.
bool is_empty_op(int op);

/// Whether the host runs the node: graphs also hold branches that were not chosen.
inline bool is_computed(const ggml_tensor *node) {
    return node->flags & ggml_flag_compute;
}

/// A function that the CPU backend's registry offers by name, or null.
void *cpu_function(const char *name);

/// Writes one line to the host's log.
void log_line(int level, const std::string &text);

}  // namespace agq
