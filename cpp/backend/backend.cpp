// Backend, device and registry tables. The device takes whole graphs, so the host makes one call and no copies. It runs
// them on an inner CPU backend with one thread pool; the host's own code computes everything that is not AGQ4.
#include "backend/backend.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "backend/cache_pages.h"
#include "backend/graph_snapshot.h"
#include "backend/shared_cores.h"
#include "backend/weight_pages.h"
#include "base/thread_value.h"
#include "host/profile.h"
#include "kernels/select.h"
#include "prune/pruner.h"
#include "rewrite/graph_rewrite.h"

namespace agq {

namespace {

using set_n_threads_fn = void (*)(ggml_backend *, int);
using set_abort_callback_fn = void (*)(ggml_backend *, ggml_abort_callback, void *);

constexpr char backend_name[] = "AGQ";

// ---- state of the device ----

/// The threads that are creating a context right now.
///
/// With flash attention "auto", libllama schedules one graph when it creates a context. It turns flash attention off
/// unless the attention node lands on the layer's own device, the CPU. Our device runs that node on the same CPU code.
/// So it declines all nodes in that thread, from the creation of a backend to its first graph.
class creations {
  public:
    void begin(const void *backend) {
        const std::lock_guard<std::mutex> lock(mutex_);
        open_.emplace(backend, std::this_thread::get_id());
        count_.store(open_.size(), std::memory_order_relaxed);
    }
    void end(const void *backend) {
        const std::lock_guard<std::mutex> lock(mutex_);
        open_.erase(backend);
        count_.store(open_.size(), std::memory_order_relaxed);
    }
    /// Whether the calling thread is creating a context.
    bool in_this_thread() const {
        if (count_.load(std::memory_order_relaxed) == 0) return false;
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto here = [](const auto &entry) { return entry.second == std::this_thread::get_id(); };
        return std::any_of(open_.begin(), open_.end(), here);
    }

  private:
    mutable std::mutex mutex_;
    std::map<const void *, std::thread::id> open_;
    std::atomic<size_t> count_{0};
};

struct device_context {
    const kernel *kern = nullptr;
    options chosen;
    std::string description;

    /// Set once the host asks about a node with AGQ4 weights. Until then the device declines everything, so a process
    /// without such a model runs exactly as it does without the plugin.
    std::atomic<bool> agq4_seen{false};
    /// Set once a context is created with its own pruning settings: a list of layers must also work for models without
    /// AGQ4 tensors.
    std::atomic<bool> pruning_asked_for{false};
    creations creating;
};

device_context &context_of(ggml_backend_device *device) {
    return *static_cast<device_context *>(device->context);
}

// ---- threads of the inner backend ----

/// Hosts built without OpenMP start and join threads in every graph, unless the backend has a thread pool.
class thread_pool {
  public:
    ~thread_pool() {
        if (pool_) reinterpret_cast<void (*)(void *)>(cpu_function("ggml_threadpool_free"))(pool_);
    }

    void resize(ggml_backend *cpu, int n_threads) {
        if (host.openmp || n_threads == n_threads_) return;
        using set_pool_fn = void (*)(ggml_backend *, void *);
        const auto create = reinterpret_cast<void *(*)(void *)>(cpu_function("ggml_threadpool_new"));
        const auto destroy = reinterpret_cast<void (*)(void *)>(cpu_function("ggml_threadpool_free"));
        const auto attach = reinterpret_cast<set_pool_fn>(cpu_function("ggml_backend_cpu_set_threadpool"));
        if (!create || !destroy || !attach) return;
        alignas(16) unsigned char params[2048] = {};  // larger than the struct of any supported release
        host.ggml_threadpool_params_init(params, n_threads);
        void *fresh = create(params);
        if (!fresh) return;
        attach(cpu, fresh);
        if (pool_) destroy(pool_);
        pool_ = fresh;
        n_threads_ = n_threads;
    }

  private:
    void *pool_ = nullptr;
    int n_threads_ = 0;
};

// ---- backend ----

/// The options of a context, parsed.
struct context_settings {
    prune_settings pruning;
    activation_settings activations;
    const attention_kernel *attention = nullptr;
    const kernel *kern = nullptr;
};

bool read_settings(context_settings *settings, std::string *error) {
    const auto text = read_context_option;
    if (!parse_prune_settings(text(context_option::prune), &settings->pruning, error) ||
        !parse_activation_settings(text(context_option::activation_bits), &settings->activations, error) ||
        !parse_attention_option(text(context_option::attention), &settings->attention, error)) {
        return false;
    }
    settings->kern = select_kernel(text(context_option::isa).c_str(), error);
    return settings->kern != nullptr;
}

struct backend_context {
    backend_context(device_context &device_state, ggml_backend *inner_cpu, const context_settings &settings)
        : device(device_state),
          cpu(inner_cpu),
          rewriter(settings.kern, device.chosen.fuse, device.chosen.take_all, settings.activations, settings.attention),
          pruning(settings.kern->attention, settings.pruning),
          may_prune(settings.pruning.given),
          pages(device.chosen.huge_pages),
          caches(device.chosen.huge_pages),
          cores(device.chosen.wait) {
        device.creating.begin(this);
    }
    ~backend_context() {
        end_creation();
        host.ggml_backend_free(cpu);
    }
    backend_context(const backend_context &) = delete;
    backend_context &operator=(const backend_context &) = delete;

    /// Called when the backend gets a graph: the context is complete.
    void end_creation() {
        if (is_new) device.creating.end(this);
        is_new = false;
    }

    device_context &device;
    ggml_backend *cpu;
    bool is_new = true;
    thread_pool threads;
    std::vector<ggml_tensor *> computed;  ///< the nodes to compute, for graphs that also hold others
    graph_snapshot snapshot;
    graph_rewriter rewriter;
    pruner pruning;
    bool may_prune;         ///< also set by the first AGQ4 tensor: stock models are not touched unless asked for
    int n_threads = 4;      ///< ggml's default, until the host sets it
    int inner_threads = 4;  ///< those of the inner backend
    weight_pages pages;
    cache_pages caches;
    shared_cores cores;
    std::string last_error;  ///< so that a failing model is reported once, not once per token
};

backend_context &context_of(ggml_backend *backend) {
    return *static_cast<backend_context *>(backend->context);
}

const char *backend_get_name(ggml_backend *) {
    return backend_name;
}

void backend_free(ggml_backend *backend) {
    delete &context_of(backend);
    delete backend;
}

ggml_status compute_nodes(backend_context &context, ggml_tensor **nodes, int n, bool repeated,
                          const key_choices &choices) {
    std::string error;
    const int64_t begun = profile_enabled() ? profile_time() : 0;
    ggml_cgraph *rewritten = context.rewriter.rewrite(nodes, n, repeated, choices, context.n_threads, &error);
    if (profile_enabled()) add_profile_time("(rewriting the graph)", profile_time() - begun);
    if (rewritten) {
        const ggml_status status = host.ggml_backend_graph_compute(context.cpu, rewritten);
        context.rewriter.record_bits();
        return status;
    }
    if (error != context.last_error) log_line(log_error, error);
    context.last_error = error;
    return status_failed;
}

/// The nodes that the host computes. Graphs also hold branches that were not chosen; their inputs have no values.
ggml_tensor **find_computed(backend_context &context, ggml_cgraph *graph, int *n) {
    ggml_tensor **nodes = host.ggml_graph_nodes(graph);
    *n = host.ggml_graph_n_nodes(graph);
    if (std::all_of(nodes, nodes + *n, is_computed)) return nodes;
    context.computed.clear();
    std::copy_if(nodes, nodes + *n, std::back_inserter(context.computed), is_computed);
    *n = static_cast<int>(context.computed.size());
    return context.computed.data();
}

void set_inner_threads(backend_context &context, int n_threads) {
    if (n_threads == context.inner_threads) return;
    if (const auto set = reinterpret_cast<set_n_threads_fn>(cpu_function("ggml_backend_set_n_threads"))) {
        set(context.cpu, n_threads);
        context.inner_threads = n_threads;
    }
}

/// Watches a graph for other processes on its cores, and computes it with fewer threads if that is faster then.
class watched_graph {
  public:
    watched_graph(backend_context &context, ggml_tensor **nodes, int n) : context_(context) {
        // The first node looks up the tokens. Another number would only mix the times of different graphs.
        set_inner_threads(context, context.cores.begin(context.n_threads, n > 0 ? nodes[0]->ne[1] : 1));
    }
    ~watched_graph() { context_.cores.end(); }
    watched_graph(const watched_graph &) = delete;
    watched_graph &operator=(const watched_graph &) = delete;

  private:
    backend_context &context_;
};

ggml_status backend_graph_compute(ggml_backend *backend, ggml_cgraph *graph) {
    backend_context &context = context_of(backend);
    try {
        context.end_creation();
        int n = 0;
        ggml_tensor **nodes = find_computed(context, graph, &n);
        const bool repeated = context.snapshot.is_repeated(nodes, n);
        const bool has_agq4 = context.device.chosen.take_all || std::any_of(nodes, nodes + n, uses_agq4);
        context.may_prune = context.may_prune || has_agq4;
        if (!context.may_prune && !profile_enabled()) return host.ggml_backend_graph_compute(context.cpu, graph);
        if (has_agq4 && !repeated) {
            context.pages.move(nodes, n, context.n_threads);
            context.caches.renew(nodes, n);
        }
        const watched_graph watched(context, nodes, n);
        int64_t computing = 0;  // nanoseconds spent in `compute`, which are not the pruner's own
        const auto compute_part = [&](ggml_tensor **part, int size, bool part_repeated, const key_choices &choices) {
            if (part == nodes && !has_agq4 && !profile_enabled()) {
                return host.ggml_backend_graph_compute(context.cpu, graph);
            }
            return compute_nodes(context, part, size, part_repeated, choices);
        };
        if (!profile_enabled()) return context.pruning.run(nodes, n, repeated, context.n_threads, compute_part);
        const auto compute = [&](ggml_tensor **part, int size, bool part_repeated, const key_choices &choices) {
            const int64_t begun = profile_time();
            const ggml_status status = compute_part(part, size, part_repeated, choices);
            computing += profile_time() - begun;
            return status;
        };
        const int64_t begun = profile_time();
        const ggml_status status = context.pruning.run(nodes, n, repeated, context.n_threads, compute);
        add_profile_time("(planning what to prune)", profile_time() - begun - computing);
        return status;
    } catch (const std::bad_alloc &) {
        log_line(log_error, "out of memory for activations; use a smaller n_ubatch");
        return status_alloc_failed;
    } catch (const std::exception &e) {
        log_line(log_error, e.what());
        return status_failed;
    }
}

void backend_graph_optimize(ggml_backend *backend, ggml_cgraph *) {
    context_of(backend).end_creation();
}

uint8_t backend_guid[16] = {0x41, 0x47, 0x51, 0x34, 0x9d, 0x3b, 0x4c, 0x0e,
                            0x8a, 0x61, 0x57, 0x2f, 0xc4, 0x18, 0xe3, 0x70};

void set_n_threads(ggml_backend *backend, int n_threads) {
    backend_context &context = context_of(backend);
    context.n_threads = n_threads;
    context.threads.resize(context.cpu, n_threads);
    context.inner_threads = 0;
    set_inner_threads(context, n_threads);
}

void set_abort_callback(ggml_backend *backend, ggml_abort_callback callback, void *data) {
    if (const auto set = reinterpret_cast<set_abort_callback_fn>(cpu_function("ggml_backend_set_abort_callback"))) {
        set(context_of(backend).cpu, callback, data);
    }
}

// ---- device ----

const char *device_get_name(ggml_backend_device *) {
    return backend_name;
}

const char *device_get_description(ggml_backend_device *device) {
    return context_of(device).description.c_str();
}

void device_get_memory(ggml_backend_device *, size_t *free, size_t *total) {
    host.ggml_backend_dev_memory(host.cpu, free, total);
}

int device_get_type(ggml_backend_device *) {
    return device_accel;
}

void device_get_props(ggml_backend_device *device, ggml_backend_dev_props *props) {
    props->name = device_get_name(device);
    props->description = device_get_description(device);
    device_get_memory(device, &props->memory_free, &props->memory_total);
    props->type = device_get_type(device);
    props->device_id = nullptr;
    props->caps = {};
    props->caps.buffer_from_host_ptr = true;
}

ggml_backend *device_init_backend(ggml_backend_device *device, const char *) {
    try {
        std::string error;
        context_settings settings;
        if (!read_settings(&settings, &error)) {
            log_line(log_error, error);
            return nullptr;
        }
        device_context &state = context_of(device);
        if (settings.pruning.given) state.pruning_asked_for.store(true, std::memory_order_relaxed);
        ggml_backend *cpu = host.ggml_backend_dev_init(host.cpu, nullptr);
        if (!cpu) return nullptr;
        auto context = std::make_unique<backend_context>(state, cpu, settings);
        auto backend = std::make_unique<ggml_backend>();
        *backend = {};
        backend->guid = &backend_guid;
        backend->iface.get_name = backend_get_name;
        backend->iface.free = backend_free;
        backend->iface.graph_compute = backend_graph_compute;
        backend->iface.graph_optimize = backend_graph_optimize;
        backend->device = device;
        backend->context = context.release();
        return backend.release();
    } catch (const std::bad_alloc &) {
        return nullptr;
    }
}

ggml_backend_buffer_type *device_get_buffer_type(ggml_backend_device *) {
    return host.ggml_backend_dev_buffer_type(host.cpu);
}

ggml_backend_buffer *device_buffer_from_host_ptr(ggml_backend_device *, void *data, size_t size, size_t max_tensor) {
    return host.ggml_backend_dev_buffer_from_host_ptr(host.cpu, data, size, max_tensor);
}

bool device_supports_op(ggml_backend_device *device, const ggml_tensor *op) {
    device_context &context = context_of(device);
    if (uses_agq4(op)) {
        context.agq4_seen.store(true, std::memory_order_relaxed);
        return true;
    }
    if (!context.chosen.take_all) {
        const bool wanted = context.agq4_seen.load(std::memory_order_relaxed) ||
                            context.pruning_asked_for.load(std::memory_order_relaxed);
        if (!wanted || (op->op == host.op_flash_attn_ext && context.creating.in_this_thread())) return false;
    }
    return host.ggml_backend_dev_supports_op(host.cpu, op);
}

bool device_supports_buft(ggml_backend_device *, ggml_backend_buffer_type *type) {
    return host.ggml_backend_dev_supports_buft(host.cpu, type);
}

// ---- registry ----

const char *registry_get_name(ggml_backend_reg *) {
    return backend_name;
}

size_t registry_get_device_count(ggml_backend_reg *) {
    return 1;
}

ggml_backend_device *registry_get_device(ggml_backend_reg *registry, size_t) {
    return static_cast<ggml_backend_device *>(registry->context);
}

void *registry_get_proc_address(ggml_backend_reg *, const char *name) {
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) return reinterpret_cast<void *>(set_n_threads);
    if (std::strcmp(name, "ggml_backend_set_abort_callback") == 0) return reinterpret_cast<void *>(set_abort_callback);
    return nullptr;
}

}  // namespace

ggml_backend_reg *backend_registry(const kernel *kern, const options &chosen) {
    static device_context context;
    context.kern = kern;
    context.chosen = chosen;
    context.description = std::string("Agile-Quant 4-bit kernels (") + kern->name + ")";
    static ggml_backend_device device = {};
    static ggml_backend_reg registry = [] {
        ggml_backend_reg r = {};
        r.iface.get_name = registry_get_name;
        r.iface.get_device_count = registry_get_device_count;
        r.iface.get_device = registry_get_device;
        r.iface.get_proc_address = registry_get_proc_address;
        r.context = &device;
        return r;
    }();
    registry.api_version = host.api_version;
    device.iface.get_name = device_get_name;
    device.iface.get_description = device_get_description;
    device.iface.get_memory = device_get_memory;
    device.iface.get_type = device_get_type;
    device.iface.get_props = device_get_props;
    device.iface.init_backend = device_init_backend;
    device.iface.get_buffer_type = device_get_buffer_type;
    device.iface.buffer_from_host_ptr = device_buffer_from_host_ptr;
    device.iface.supports_op = device_supports_op;
    device.iface.supports_buft = device_supports_buft;
    device.reg = &registry;
    device.context = &context;
    return &registry;
}

bool check_context_option(context_option which, const char *text, std::string *error) {
    context_settings ignored;
    switch (which) {
        case context_option::prune:
            return parse_prune_settings(text, &ignored.pruning, error);
        case context_option::activation_bits:
            return parse_activation_settings(text, &ignored.activations, error);
        case context_option::attention:
            return parse_attention_option(text, &ignored.attention, error);
        case context_option::isa:
            return select_kernel(text, error) != nullptr;
    }
    return false;
}

}  // namespace agq
