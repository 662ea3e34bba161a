// A device of type GPU for tests of models that run on two devices: it takes every operation that has no AGQ4 weights,
// and runs it on an inner CPU backend in host memory. What a real one would copy stays where it is; which part of a
// graph each device is given is the same.
#include <cstring>
#include <string>

#include "host/host.h"

namespace {

using namespace agq;

constexpr int device_gpu = 1;
constexpr int agq4 = 38;

struct context {
    ggml_backend *cpu;
};

const char *backend_name(ggml_backend *) {
    return "Second";
}
const char *device_name(ggml_backend_device *) {
    return "Second0";
}
void device_memory(ggml_backend_device *, size_t *free, size_t *total) {
    *free = *total = size_t{8} << 30;
}
int device_type(ggml_backend_device *) {
    return device_gpu;
}
void device_props(ggml_backend_device *device, ggml_backend_dev_props *props) {
    props->name = props->description = device_name(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->type = device_gpu;
}
ggml_backend_buffer_type *device_buffer_type(ggml_backend_device *) {
    return host.ggml_backend_dev_buffer_type(host.cpu);
}
bool device_supports_op(ggml_backend_device *, const ggml_tensor *op) {
    const bool has_agq4 = op->src[0] && op->src[0]->type == agq4;
    return !has_agq4 && host.ggml_backend_dev_supports_op(host.cpu, op);
}
bool device_supports_buft(ggml_backend_device *, ggml_backend_buffer_type *type) {
    return host.ggml_backend_dev_supports_buft(host.cpu, type);
}

void backend_free(ggml_backend *backend) {
    context *c = static_cast<context *>(backend->context);
    host.ggml_backend_free(c->cpu);
    delete c;
    delete backend;
}
ggml_status backend_compute(ggml_backend *backend, ggml_cgraph *graph) {
    return host.ggml_backend_graph_compute(static_cast<context *>(backend->context)->cpu, graph);
}
uint8_t guid[16] = {2, 2, 2, 2};

ggml_backend *device_init(ggml_backend_device *device, const char *) {
    ggml_backend *backend = new ggml_backend{};
    backend->guid = &guid;
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = backend_compute;
    backend->device = device;
    backend->context = new context{host.ggml_backend_dev_init(host.cpu, nullptr)};
    return backend;
}

ggml_backend_device the_device;
ggml_backend_reg the_registry;

const char *registry_name(ggml_backend_reg *) {
    return "Second";
}
size_t registry_count(ggml_backend_reg *) {
    return 1;
}
ggml_backend_device *registry_device(ggml_backend_reg *, size_t) {
    return &the_device;
}
void *registry_function(ggml_backend_reg *, const char *) {
    return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg *ggml_backend_init() {
    std::string error;
    const auto library = loaded_library::offering("ggml_version", __builtin_return_address(0));
    if (!connect_host(library, &error)) return nullptr;
    ggml_backend_device_i &d = the_device.iface;
    d.get_name = d.get_description = device_name;
    d.get_memory = device_memory;
    d.get_type = device_type;
    d.get_props = device_props;
    d.init_backend = device_init;
    d.get_buffer_type = device_buffer_type;
    d.supports_op = device_supports_op;
    d.supports_buft = device_supports_buft;
    the_device.reg = &the_registry;
    the_registry.api_version = host.ggml_backend_dev_backend_reg(host.cpu)->api_version;
    the_registry.iface = {registry_name, registry_count, registry_device, registry_function};
    return &the_registry;
}
