// Calls one matrix product a given number of times and does nothing else. An emulator counts the instructions
// (benchmarks/instructions.py): the count for one call is that of a run with three calls minus that of a run with two.
//
//   instructions KERNEL BITS M K TOKENS CALLS           a kernel of this project
//   instructions FUNCTION LIBRARY M K TOKENS CALLS      q4_0_4x4 or q4_0_4x8, stock ggml's kernels for repacked Q4_0
//
// Operands are zero, because the instructions do not depend on them.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels/select.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace {

int run_ours(const agq::kernel &row, int bits, int m, int k, int tokens, int calls) {
    std::vector<agq::half_tile> weights(static_cast<size_t>(m / 16) * (k / 64));
    const std::vector<uint8_t> codebook(16);
    const std::vector<int8_t> q(static_cast<size_t>(k) * tokens);
    const std::vector<int32_t> bias(static_cast<size_t>(k / 64) * tokens);
    const std::vector<float> scale(static_cast<size_t>(tokens));
    std::vector<float> out(static_cast<size_t>(m) * tokens);
    std::vector<float *> rows(static_cast<size_t>(tokens));
    for (int t = 0; t < tokens; t++) rows[t] = out.data() + static_cast<size_t>(t) * m;
    for (int i = 0; i < calls; i++) {
        row.gemm({reinterpret_cast<const agq::tile *>(weights.data()), k, m / 16, codebook.data(), 1.0f, false,
                  q.data(), bias.data(), scale.data(), tokens, rows.data(), bits});
    }
    return 0;
}

#if defined(__unix__) || defined(__APPLE__)

/// The signature of ggml's products on repacked weights: k, result, row length of the result, weights, activations,
/// activation rows, weight rows.
using stock_product = void (*)(int n, float *s, size_t bs, const void *vx, const void *vy, int nr, int nc);

/// Q4_0 and Q8_0 in ggml: blocks of 32 with one binary16 scale, here with 4 rows interleaved.
int run_stock(const std::string &name, const char *library, int m, int k, int tokens, int calls) {
    void *handle = dlopen(library, RTLD_NOW);
    if (handle == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    // Activation rows are multiplied in fours; a single row has its own function.
    const std::string function = std::string(tokens % 4 == 0 ? "ggml_gemm_" : "ggml_gemv_") + name + "_q8_0";
    const auto product = reinterpret_cast<stock_product>(dlsym(handle, function.c_str()));
    if (product == nullptr || (tokens % 4 != 0 && tokens != 1)) {
        std::fprintf(stderr, "%s has no %s for %d tokens\n", library, function.c_str(), tokens);
        return 1;
    }
    const std::vector<char> weights(static_cast<size_t>(m) * (k / 32) * 18);
    const std::vector<char> activations(static_cast<size_t>(tokens) * (k / 32) * 34);
    std::vector<float> out(static_cast<size_t>(m) * tokens);
    for (int i = 0; i < calls; i++) {
        product(k, out.data(), static_cast<size_t>(m), weights.data(), activations.data(), tokens, m);
    }
    return 0;
}

#endif

}  // namespace

int main(int argc, char **argv) {
    if (argc != 7) {
        std::fprintf(stderr, "usage: instructions KERNEL BITS|LIBRARY M K TOKENS CALLS\n");
        return 2;
    }
    const int m = std::atoi(argv[3]), k = std::atoi(argv[4]), tokens = std::atoi(argv[5]), calls = std::atoi(argv[6]);
    if (m < 16 || m % 16 != 0 || k < 128 || k % 128 != 0 || tokens < 1 || calls < 1) {
        std::fprintf(stderr, "M is a multiple of 16, K of 128, TOKENS and CALLS are positive\n");
        return 2;
    }
    const std::string name = argv[1];
#if defined(__unix__) || defined(__APPLE__)
    if (name.rfind("q4_0", 0) == 0) return run_stock(name, argv[2], m, k, tokens, calls);
#endif
    std::string error;
    const agq::kernel *row = agq::select_kernel(name.c_str(), &error);
    if (row == nullptr) {
        std::fprintf(stderr, "%s\n", error.c_str());
        return 2;
    }
    return run_ours(*row, std::atoi(argv[2]), m, k, tokens, calls);
}
