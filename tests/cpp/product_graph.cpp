// Runs a ggml graph with one product on AGQ4 weights, with the plugin in stock ggml. For machines without Python, such
// as an emulated Arm.
//
//   product_graph LIBRARIES PLUGIN M K TOKENS WEIGHTS ACTIVATIONS OUTPUT
//
// LIBRARIES is the folder of libggml-base, libggml-cpu and libggml. WEIGHTS holds the bytes of an M x K matrix,
// ACTIVATIONS TOKENS x K floats; TOKENS x M floats go to OUTPUT. The graph also has a stock operation, which adds 1 to
// the product.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "format/blocks.h"
#include "host/host.h"

namespace {

using namespace agq;

[[noreturn]] void fail(const std::string &what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

/// A function of the loaded libraries.
template <class type>
type function(const char *name) {
    void *symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) fail(std::string("no function ") + name);
    return reinterpret_cast<type>(symbol);
}

#define CALL(result, name, parameters) function<result(*) parameters>(#name)

std::vector<char> read_file(const char *path, size_t bytes) {
    std::vector<char> data(bytes + 1);
    std::FILE *file = std::fopen(path, "rb");
    if (file == nullptr || std::fread(data.data(), 1, bytes + 1, file) != bytes) {
        fail(std::string(path) + ": " + std::to_string(bytes) + " bytes are wanted");
    }
    std::fclose(file);
    data.resize(bytes);
    return data;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 9) fail("usage: product_graph LIBRARIES PLUGIN M K TOKENS WEIGHTS ACTIVATIONS OUTPUT");
    for (const char *name : {"libggml-base.so", "libggml-cpu.so", "libggml.so"}) {
        const std::string path = std::string(argv[1]) + "/" + name;
        if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) fail(dlerror());
    }
    if (CALL(ggml_backend_reg *, ggml_backend_load, (const char *))(argv[2]) == nullptr) {
        void *plugin = dlopen(argv[2], RTLD_NOW);
        const auto reason = reinterpret_cast<const char *(*)()>(plugin ? dlsym(plugin, "agq_last_error") : nullptr);
        fail(std::string("the plugin was not loaded: ") + (reason ? reason() : "no library"));
    }
    ggml_backend_device *device = CALL(ggml_backend_device *, ggml_backend_dev_by_name, (const char *))("AGQ");
    ggml_backend_device *cpu = CALL(ggml_backend_device *, ggml_backend_dev_by_type, (int))(device_cpu);
    if (device == nullptr || cpu == nullptr) fail("no device");

    const int64_t m = std::atoll(argv[3]), k = std::atoll(argv[4]), tokens = std::atoll(argv[5]);
    const std::vector<char> weights =
        read_file(argv[6], static_cast<size_t>(m * k / ggml_block_size) * ggml_block_bytes);
    const std::vector<char> activations = read_file(argv[7], static_cast<size_t>(k * tokens) * sizeof(float));

    ggml_context *context = CALL(ggml_context *, ggml_init, (ggml_init_params))({1 << 20, nullptr, true});
    const auto new_tensor = CALL(ggml_tensor *, ggml_new_tensor_3d, (ggml_context *, int, int64_t, int64_t, int64_t));
    ggml_tensor *w = new_tensor(context, ggml_type_id, k, m, 1);
    ggml_tensor *x = new_tensor(context, ggml_type_f32, k, tokens, 1);
    ggml_tensor *one = new_tensor(context, ggml_type_f32, m, 1, 1);
    ggml_tensor *product =
        CALL(ggml_tensor *, ggml_mul_mat, (ggml_context *, ggml_tensor *, ggml_tensor *))(context, w, x);
    ggml_tensor *y =
        CALL(ggml_tensor *, ggml_add, (ggml_context *, ggml_tensor *, ggml_tensor *))(context, product, one);
    ggml_cgraph *graph = CALL(ggml_cgraph *, ggml_new_graph, (ggml_context *))(context);
    CALL(void, ggml_build_forward_expand, (ggml_cgraph *, ggml_tensor *))(graph, y);

    // Same as libllama: CPU memory, and the device is asked about each node before it gets the graph.
    const auto buffer_type =
        CALL(ggml_backend_buffer_type *, ggml_backend_dev_buffer_type, (ggml_backend_device *))(cpu);
    if (!CALL(void *, ggml_backend_alloc_ctx_tensors_from_buft, (ggml_context *, ggml_backend_buffer_type *))(
            context, buffer_type)) {
        fail("no memory");
    }
    const auto set = CALL(void, ggml_backend_tensor_set, (ggml_tensor *, const void *, size_t, size_t));
    set(w, weights.data(), 0, weights.size());
    set(x, activations.data(), 0, activations.size());
    const std::vector<float> ones(static_cast<size_t>(m), 1.0f);
    set(one, ones.data(), 0, ones.size() * sizeof(float));
    const auto supports = CALL(bool, ggml_backend_dev_supports_op, (ggml_backend_device *, const ggml_tensor *));
    if (!supports(device, product) || !supports(device, y)) fail("the plugin declines the graph");

    ggml_backend *backend =
        CALL(ggml_backend *, ggml_backend_dev_init, (ggml_backend_device *, const char *))(device, nullptr);
    if (backend == nullptr) fail("no backend");
    if (CALL(ggml_status, ggml_backend_graph_compute, (ggml_backend *, ggml_cgraph *))(backend, graph) !=
        status_success) {
        fail("the graph failed");
    }
    std::vector<float> out(static_cast<size_t>(m * tokens));
    CALL(void, ggml_backend_tensor_get, (const ggml_tensor *, void *, size_t, size_t))(y, out.data(), 0,
                                                                                       out.size() * sizeof(float));
    std::FILE *file = std::fopen(argv[8], "wb");
    if (file == nullptr || std::fwrite(out.data(), sizeof(float), out.size(), file) != out.size()) fail(argv[8]);
    std::fclose(file);
    CALL(void, ggml_backend_free, (ggml_backend *))(backend);
    return 0;
}
