// The main function of a test program: sets the seed, and runs a test for each kernel that this CPU supports.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "kernels/select.h"

/// Prints the seed, which `--seed N` sets, and calls test(kernel, generator) with the same random numbers for each
/// kernel.
template <class function>
void for_each_kernel(int argc, char **argv, const function &test) {
    unsigned seed = std::random_device{}();
    if (argc == 3 && std::string(argv[1]) == "--seed") seed = static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10));
    std::printf("seed %u\n", seed);
    for (const agq::kernel *row : agq::compiled_kernels()) {
        if (!row->supported()) continue;
        std::mt19937 rng(seed);
        test(*row, rng);
        std::printf("%s: tested\n", row->name);
    }
}
