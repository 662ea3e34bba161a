// Rows of one product with 8 and with 4 bits: each must be, bit by bit, what it is when all rows have its bits. With
// every kernel this CPU can run, on random choices. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/select.h"
#include "nodes/product.h"

namespace {

using namespace agq;

ggml_tensor matrix(void *data, int64_t columns, int64_t rows) {
    ggml_tensor t = {};
    t.data = data;
    t.ne[0] = columns, t.ne[1] = rows, t.ne[2] = t.ne[3] = 1;
    t.nb[0] = 4, t.nb[1] = static_cast<size_t>(columns) * 4;
    t.nb[2] = t.nb[3] = t.nb[1] * static_cast<size_t>(rows);
    return t;
}

struct problem {
    int k, m, tokens;
    std::vector<tile> weights;
    std::vector<float> x;
    tensor_attributes attributes;
};

/// [tokens][m]; `bits` of all rows, but 4 of those in `four` unless that is null.
std::vector<float> multiply(problem &p, const kernel &kern, int bits, const std::vector<uint8_t> *four) {
    std::vector<float> out(static_cast<size_t>(p.tokens) * p.m, -1.0f);
    const ggml_tensor x = matrix(p.x.data(), p.k, p.tokens), w = matrix(p.weights.data(), p.k, p.m);
    ggml_tensor y = matrix(out.data(), p.m, p.tokens);
    activation_buffer buffer;
    buffer.reserve(p.tokens, p.k);
    thread_memory memory;
    memory.reserve(static_cast<size_t>(p.tokens) * sizeof(float *), 1);
    activation_set set;
    set.x = &x;
    set.kern = &kern;
    set.attributes = &p.attributes;
    set.buffer = &buffer;
    set.memory = &memory;
    set.bits = bits;
    set.four = four;
    product job;
    job.set = &set;
    job.weights = &w;
    job.attributes = &p.attributes;
    job.memory = &memory;
    route_node(nullptr, 0, 1, &set);
    quantize_node(nullptr, 0, 1, &set);
    product_node(&y, 0, 1, &job);
    return out;
}

problem random_problem(std::mt19937 &rng) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    problem p;
    p.k = 128 * pick(1, 6);
    p.m = 16 * pick(1, 5);
    p.tokens = pick(1, 40);
    p.weights.resize(static_cast<size_t>(p.k / 128) * (p.m / 16));
    for (tile &t : p.weights) {
        for (auto &chunk : t.codes) {
            for (uint8_t &c : chunk) c = static_cast<uint8_t>(pick(0, 255));
        }
        std::memset(t.scale_hi, 0x2C, sizeof t.scale_hi);
        for (uint8_t &s : t.scale_lo) s = static_cast<uint8_t>(pick(0, 255));
    }
    std::normal_distribution<float> normal;
    p.x.resize(static_cast<size_t>(p.k) * p.tokens);
    for (float &v : p.x) v = normal(rng);
    auto a = std::make_shared<matrix_attributes>();
    for (int i = 0; i < 16; ++i) a->codebook[i] = static_cast<uint8_t>(8 * i + 3);
    a->exponents.assign(static_cast<size_t>(p.k / 64), 1);
    a->header.tensor_scale = 0.5f;
    a->format = {p.k, 8, pick(0, 1) == 1, a->exponents.data(), nullptr, nullptr, 0};
    p.attributes = {a};
    return p;
}

}  // namespace

int main(int argc, char **argv) {
    unsigned seed = std::random_device{}();
    if (argc == 3 && std::strcmp(argv[1], "--seed") == 0) seed = static_cast<unsigned>(std::atoi(argv[2]));
    std::printf("seed %u, kernels:", seed);
    for (const kernel *row : compiled_kernels()) {
        if (row->supported()) std::printf(" %s", row->name);
    }
    std::printf("\n");
    int mixed_rows = 0;
    for (const kernel *row : compiled_kernels()) {
        if (!row->supported()) continue;
        std::mt19937 rng(seed);
        for (int round = 0; round < 60; ++round) {
            problem p = random_problem(rng);
            std::vector<uint8_t> four(static_cast<size_t>(p.tokens));
            const int odds = std::uniform_int_distribution<int>(0, 4)(rng);  // none, some, all
            for (uint8_t &f : four) f = std::uniform_int_distribution<int>(1, 4)(rng) <= odds;
            const std::vector<float> eight_bits = multiply(p, *row, 8, nullptr),
                                     four_bits = multiply(p, *row, 4, nullptr);
            if (eight_bits == four_bits || multiply(p, *row, 0, nullptr) != eight_bits) {
                std::printf("%s: the number of bits does not count\n", row->name);
                return 1;
            }
            const std::vector<float> got = multiply(p, *row, 8, &four);
            for (int t = 0; t < p.tokens; ++t) {
                const auto begin = static_cast<std::ptrdiff_t>(t) * p.m;
                const std::vector<float> &want = four[static_cast<size_t>(t)] ? four_bits : eight_bits;
                if (!std::equal(want.begin() + begin, want.begin() + begin + p.m, got.begin() + begin)) {
                    std::printf("%s, k %d, %d rows, %d tokens: token %d differs from one with %d bits\n", row->name,
                                p.k, p.m, p.tokens, t, four[static_cast<size_t>(t)] ? 4 : 8);
                    return 1;
                }
                mixed_rows += four[static_cast<size_t>(t)];
            }
        }
    }
    std::printf("all rows agree, %d of them with 4 bits\n", mixed_rows);
    return mixed_rows > 0 ? 0 : 1;
}
