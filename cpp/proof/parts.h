// Shared by the proofs: host functions that only they call, and a place for their findings.
#pragma once

#include <memory>
#include <string>

#include "host/host.h"

namespace agq {

// X(return type, name, parameters)
#define AGQ_PROOF_FUNCTIONS(X)                                                                                        \
    X(size_t, ggml_type_size, (int))                                                                                  \
    X(int64_t, ggml_blck_size, (int))                                                                                 \
    X(const char *, ggml_type_name, (int))                                                                            \
    X(bool, ggml_is_quantized, (int))                                                                                 \
    X(size_t, ggml_row_size, (int, int64_t))                                                                          \
    X(void *, ggml_get_mem_buffer, (const ggml_context *))                                                            \
    X(bool, ggml_get_no_alloc, (ggml_context *))                                                                      \
    X(ggml_tensor *, ggml_new_tensor_4d, (ggml_context *, int, int64_t, int64_t, int64_t, int64_t))                   \
    X(ggml_tensor *, ggml_set_name, (ggml_tensor *, const char *))                                                    \
    X(void, ggml_set_input, (ggml_tensor *))                                                                          \
    X(void, ggml_set_output, (ggml_tensor *))                                                                         \
    X(ggml_tensor *, ggml_view_1d, (ggml_context *, ggml_tensor *, int64_t, size_t))                                  \
    X(ggml_tensor *, ggml_reshape_2d, (ggml_context *, ggml_tensor *, int64_t, int64_t))                              \
    X(ggml_tensor *, ggml_transpose, (ggml_context *, ggml_tensor *))                                                 \
    X(ggml_tensor *, ggml_permute, (ggml_context *, ggml_tensor *, int, int, int, int))                               \
    X(ggml_tensor *, ggml_concat, (ggml_context *, ggml_tensor *, ggml_tensor *, int))                                \
    X(ggml_tensor *, ggml_norm, (ggml_context *, ggml_tensor *, float))                                               \
    X(ggml_tensor *, ggml_rms_norm, (ggml_context *, ggml_tensor *, float))                                           \
    X(ggml_tensor *, ggml_add, (ggml_context *, ggml_tensor *, ggml_tensor *))                                        \
    X(ggml_tensor *, ggml_mul, (ggml_context *, ggml_tensor *, ggml_tensor *))                                        \
    X(ggml_tensor *, ggml_div, (ggml_context *, ggml_tensor *, ggml_tensor *))                                        \
    X(ggml_tensor *, ggml_sum_rows, (ggml_context *, ggml_tensor *))                                                  \
    X(ggml_tensor *, ggml_clamp, (ggml_context *, ggml_tensor *, float, float))                                       \
    X(ggml_tensor *, ggml_argsort, (ggml_context *, ggml_tensor *, int))                                              \
    X(ggml_tensor *, ggml_add_id, (ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *))                      \
    X(ggml_tensor *, ggml_mul_mat, (ggml_context *, ggml_tensor *, ggml_tensor *))                                    \
    X(ggml_tensor *, ggml_mul_mat_id, (ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *))                  \
    X(ggml_tensor *, ggml_get_rows, (ggml_context *, ggml_tensor *, ggml_tensor *))                                   \
    X(ggml_tensor *, ggml_set_rows, (ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *))                    \
    X(ggml_tensor *, ggml_swiglu, (ggml_context *, ggml_tensor *))                                                    \
    X(ggml_tensor *, ggml_swiglu_swapped, (ggml_context *, ggml_tensor *))                                            \
    X(ggml_tensor *, ggml_swiglu_split, (ggml_context *, ggml_tensor *, ggml_tensor *))                               \
    X(ggml_tensor *, ggml_swiglu_oai, (ggml_context *, ggml_tensor *, ggml_tensor *, float, float))                   \
    X(ggml_tensor *, ggml_rope_ext,                                                                                   \
      (ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, int, int, int, float, float, float, float, float, \
       float))                                                                                                        \
    X(ggml_tensor *, ggml_soft_max_ext, (ggml_context *, ggml_tensor *, ggml_tensor *, float, float))                 \
    X(void, ggml_soft_max_add_sinks, (ggml_tensor *, ggml_tensor *))                                                  \
    X(ggml_tensor *, ggml_flash_attn_ext,                                                                             \
      (ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, float, float, float))              \
    X(void, ggml_flash_attn_ext_add_sinks, (ggml_tensor *, ggml_tensor *))                                            \
    X(void, ggml_build_forward_expand, (ggml_cgraph *, ggml_tensor *))                                                \
    X(const char *, ggml_backend_reg_name, (ggml_backend_reg *))                                                      \
    X(size_t, ggml_backend_reg_dev_count, (ggml_backend_reg *))                                                       \
    X(ggml_backend_device *, ggml_backend_reg_dev_get, (ggml_backend_reg *, size_t))                                  \
    X(const char *, ggml_backend_dev_name, (ggml_backend_device *))                                                   \
    X(const char *, ggml_backend_dev_description, (ggml_backend_device *))                                            \
    X(int, ggml_backend_dev_type, (ggml_backend_device *))                                                            \
    X(void, ggml_backend_dev_get_props, (ggml_backend_device *, void *))                                              \
    X(ggml_backend_buffer_type *, ggml_backend_dev_host_buffer_type, (ggml_backend_device *))                         \
    X(bool, ggml_backend_dev_offload_op, (ggml_backend_device *, const ggml_tensor *))                                \
    X(void *, ggml_backend_event_new, (ggml_backend_device *))                                                        \
    X(void *, ggml_backend_guid, (ggml_backend *))                                                                    \
    X(const char *, ggml_backend_name, (ggml_backend *))                                                              \
    X(ggml_backend_device *, ggml_backend_get_device, (ggml_backend *))                                               \
    X(void, ggml_backend_synchronize, (ggml_backend *))                                                               \
    X(void *, ggml_backend_graph_plan_create, (ggml_backend *, ggml_cgraph *))                                        \
    X(ggml_status, ggml_backend_graph_compute_async, (ggml_backend *, ggml_cgraph *))                                 \
    X(void, ggml_backend_event_record, (void *, ggml_backend *))                                                      \
    X(void, ggml_backend_event_wait, (ggml_backend *, void *))                                                        \
    X(void, ggml_backend_buffer_free, (ggml_backend_buffer *))                                                        \
    X(bool, ggml_backend_buffer_is_host, (ggml_backend_buffer *))                                                     \
    X(ggml_status, ggml_backend_tensor_alloc, (ggml_backend_buffer *, ggml_tensor *, void *))                         \
    X(void *, ggml_backend_sched_new, (ggml_backend **, ggml_backend_buffer_type **, int, size_t, bool, bool))        \
    X(void, ggml_backend_sched_free, (void *))                                                                        \
    X(void, ggml_backend_sched_set_tensor_backend, (void *, ggml_tensor *, ggml_backend *))                           \
    X(bool, ggml_backend_sched_alloc_graph, (void *, ggml_cgraph *))                                                  \
    X(ggml_status, ggml_backend_sched_graph_compute, (void *, ggml_cgraph *))

struct proof_functions {
#define AGQ_DECLARE(result, name, parameters) result(*name) parameters = nullptr;
    AGQ_PROOF_FUNCTIONS(AGQ_DECLARE)
#undef AGQ_DECLARE
};

/// Valid while `prove_abi` runs.
extern proof_functions functions;

/// The findings of one proof: the first mismatch or, if there is none, a summary.
class findings {
  public:
    void summarize(const std::string &text) { summary_ = text; }

    /// Records `otherwise` if the condition is false and nothing was recorded before. Returns whether all is well so
    /// far: after a mismatch a proof must not read what it did not prove.
    bool require(bool condition, const std::string &otherwise) {
        if (!condition && wrong_.empty()) wrong_ = otherwise;
        return good();
    }

    bool good() const { return wrong_.empty(); }
    const std::string &text() const { return good() ? summary_ : wrong_; }

  private:
    std::string summary_, wrong_;
};

/// A context of the host without room for data, in our own memory: everything that the host writes there can be read.
class tensor_memory {
  public:
    tensor_memory();
    ~tensor_memory();
    tensor_memory(const tensor_memory &) = delete;
    tensor_memory &operator=(const tensor_memory &) = delete;

    /// The context. If the host made none as requested, records that and returns null.
    ggml_context *context(findings *f) const;

    /// Whether the tensor is readable, that is, inside the context's memory; records it if not.
    bool holds(findings *f, const ggml_tensor *t) const;

  private:
    std::unique_ptr<char[]> bytes_;
    char *begin_ = nullptr;
    ggml_context *context_ = nullptr;
};

/// A backend of the CPU device that starts no threads.
class one_thread_cpu {
  public:
    one_thread_cpu();
    ~one_thread_cpu();
    one_thread_cpu(const one_thread_cpu &) = delete;
    one_thread_cpu &operator=(const one_thread_cpu &) = delete;

    ggml_backend *get() const { return backend_; }

  private:
    ggml_backend *backend_;
};

// What the host reads from us (proof/tables.cpp), in the order of abi_proof.cpp; later proofs rely on earlier ones.

void prove_api_version(findings *f);
void prove_registry_table(findings *f);
void prove_device_table(findings *f);
void prove_backend_table(findings *f);
void prove_cpu_device(findings *f);

// What we read from the host (proof/values.cpp).

void prove_type_table(findings *f);
void prove_tensor(findings *f);
void prove_operations(findings *f);
void prove_graph(findings *f);
void prove_known_type(findings *f);

// In both directions (proof/tables.cpp).

void prove_scheduler(findings *f);

}  // namespace agq
