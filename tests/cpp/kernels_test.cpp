// Compares every kernel that this CPU can run with the scalar one, and the scalar one with the formulas of
// docs/format.md. Shapes are random, from a printed seed; `--seed N` repeats a run, `--rounds N` sets its length. Exit
// code 0: all agree.
//
// Every operand lies between two protected pages and touches one of them; outputs are checked for changed bytes around
// them. A kernel that reads or writes outside its operands crashes or is reported.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/select.h"
#include "product_checks.h"
#include "quantizer_checks.h"

namespace {

void test_selection(const std::vector<const kernel *> &kernels) {
    std::string error;
    for (const kernel *row : compiled_kernels()) {
        const kernel *chosen = select_kernel(row->name, &error);
        CHECK(chosen == (row->supported() ? row : nullptr), "forced %s", row->name);
        CHECK(row->nr >= 1 && row->panel_step >= 1, "%s", row->name);
    }
    CHECK(select_kernel(nullptr, &error) == kernels.front(), "the best supported kernel is first in the table");
    CHECK(select_kernel("", &error) == kernels.front(), "an empty name forces nothing");
    CHECK(compiled_kernels().back() == &kernel_scalar, "the table ends with scalar");
    for (const char *name : {"no_such_isa", "Scalar", "scalar ", "avx"}) {
        error.clear();
        CHECK(select_kernel(name, &error) == nullptr, "unknown name '%s'", name);
        CHECK(error.find(name) != std::string::npos && error.find("scalar") != std::string::npos, "%s", error.c_str());
    }
    CHECK(select_kernel("no_such_isa", nullptr) == nullptr, "error may be null");
    // If a test run forces a kernel, that kernel must have been used: CI sets the variable and reads this line.
    const char *forced = std::getenv("AGQ_FORCE_ISA");
    const kernel *active = select_kernel(forced, &error);
    CHECK(active != nullptr, "%s", error.c_str());
    if (active != nullptr) std::printf("active kernel: %s\n", active->name);
    if (active != nullptr && forced != nullptr && *forced != '\0') {
        CHECK(std::string(forced) == active->name, "forced %s", forced);
    }
}

}  // namespace

int main(int argc, char **argv) {
    unsigned long long seed = std::random_device{}();
    int rounds = 150;
    for (int i = 1; i < argc; i++) {
        if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = std::strtoull(argv[++i], nullptr, 10);
        } else if (std::strcmp(argv[i], "--rounds") == 0 && i + 1 < argc) {
            rounds = std::atoi(argv[++i]);
        } else {
            std::printf("usage: %s [--seed N] [--rounds N]\n", argv[0]);
            return 2;
        }
    }
    rng.seed(seed);
    std::vector<const kernel *> kernels;
    std::printf("seed %llu, kernels:", seed);
    for (const kernel *row : compiled_kernels()) {
        std::printf(" %s%s", row->name, row->supported() ? "" : " (not supported here)");
        if (row->supported()) kernels.push_back(row);
    }
    std::printf("\n");

    test_selection(kernels);
    for (int i = 0; i < rounds; i++) {
        test_quantizers(kernels);
        test_gemm_exact(kernels);
        test_gemm_general(kernels);
    }
    if (failures > 0) std::printf("%d failures, repeat with --seed %llu\n", failures, seed);
    if (failures == 0) std::printf("all %d rounds agree\n", rounds);
    return failures == 0 ? 0 : 1;
}
