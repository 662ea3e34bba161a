// Tests products with 8-bit and 4-bit rows: each row must be bit-identical to its result when all rows have its bits.
// Also tests a last panel of fewer than 16 rows: its rows must be bit-identical to those in a matrix of full panels.
// And several threads, which divide blocks of tokens: the bits of one thread. Runs every kernel that this CPU can run,
// on random choices. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
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

/// Where the fields of row m in group g are, by docs/format.md.
struct place {
    uint8_t *scale_hi, *scale_lo;
    bool is_high;     ///< which nibble of scale_lo
    uint8_t *codes;   ///< of the first chunk
    size_t to_chunk;  ///< distance from one chunk to the next
};

place place_of(uint8_t *bytes, int rows, int k, int m, int g) {
    const int groups = k / 64, first = m / 16 * 16, r = std::min(16, rows - first), i = m - first;
    uint8_t *panel = bytes + static_cast<ptrdiff_t>(first) * groups * 34;
    const size_t to_chunk = 4 * static_cast<size_t>(r);
    if (g % 2 == 0 && g == groups - 1) {
        uint8_t *half = panel + 34 * r * g;
        return {half + i, half + r + i / 2, i % 2 == 1, half + 2 * r + 4 * i, to_chunk};
    }
    uint8_t *t = panel + 68 * r * (g / 2);
    return {t + g % 2 * r + i, t + 2 * r + i, g % 2 == 1, t + (4 + 32 * (g % 2)) * r + 4 * i, to_chunk};
}

struct problem {
    int k, m, tokens;
    std::vector<uint8_t> weights;
    std::vector<float> x;
    tensor_attributes attributes;
};

/// Runs a node on all threads.
void run(const custom_node &node, int threads, void *userdata) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(node.run, nullptr, i, threads, userdata);
    node.run(nullptr, 0, threads, userdata);
    for (std::thread &t : others) t.join();
}

/// Result [tokens][m]. All rows have `bits`, but those in `four`, unless it is null, have 4.
std::vector<float> multiply(problem &p, const kernel &kern, int bits, const std::vector<uint8_t> *four,
                            int threads = 1) {
    std::vector<float> out(static_cast<size_t>(p.tokens) * p.m, -1.0f);
    const ggml_tensor x = matrix(p.x.data(), p.k, p.tokens), w = matrix(p.weights.data(), p.k, p.m);
    ggml_tensor y = matrix(out.data(), p.m, p.tokens);
    activation_buffer buffer;
    buffer.reserve(p.tokens, p.k);
    thread_memory memory;
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
    job.parts.push_back({&w, &p.attributes, &y});
    job.memory = &memory;
    memory.reserve(std::max(set.thread_bytes(), job.thread_bytes()), threads);
    run(node::route, threads, &set);
    run(node::quantize, threads, &set);
    run(node::multiply, threads, &job);
    return out;
}

problem random_problem(std::mt19937 &rng) {
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    problem p;
    p.k = 64 * pick(1, 12);
    p.m = pick(1, 80);
    p.tokens = pick(1, 40);
    p.weights.resize(matrix_bytes(p.m, p.k));
    for (uint8_t &byte : p.weights) byte = static_cast<uint8_t>(pick(0, 255));
    for (int m = 0; m < p.m; ++m) {
        for (int g = 0; g < p.k / 64; ++g) *place_of(p.weights.data(), p.m, p.k, m, g).scale_hi = 0x2C;
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

/// The same rows in a matrix of full panels, followed by other rows.
problem widened(const problem &narrow) {
    problem wide = narrow;
    wide.m = (narrow.m + 15) / 16 * 16;
    wide.weights.assign(matrix_bytes(wide.m, wide.k), 0x2C);
    std::vector<uint8_t> from_bytes = narrow.weights;
    for (int m = 0; m < narrow.m; ++m) {
        for (int g = 0; g < narrow.k / 64; ++g) {
            const place from = place_of(from_bytes.data(), narrow.m, narrow.k, m, g);
            const place to = place_of(wide.weights.data(), wide.m, wide.k, m, g);
            *to.scale_hi = *from.scale_hi;
            const int nibble = from.is_high ? *from.scale_lo >> 4 : *from.scale_lo & 15;
            *to.scale_lo =
                static_cast<uint8_t>(to.is_high ? (*to.scale_lo & 15) | nibble << 4 : (*to.scale_lo & 0xF0) | nibble);
            for (size_t c = 0; c < 8; ++c) std::memcpy(to.codes + c * to.to_chunk, from.codes + c * from.to_chunk, 4);
        }
    }
    return wide;
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
            const int threads = std::uniform_int_distribution<int>(2, 6)(rng);
            if (multiply(p, *row, 8, nullptr, threads) != eight_bits) {
                std::printf("%s, k %d, %d rows, %d tokens: %d threads have other results\n", row->name, p.k, p.m,
                            p.tokens, threads);
                return 1;
            }
            problem wide = widened(p);
            const std::vector<float> full = multiply(wide, *row, 8, nullptr);
            for (int t = 0; t < p.tokens; ++t) {
                if (std::equal(full.begin() + t * wide.m, full.begin() + t * wide.m + p.m,
                               eight_bits.begin() + t * p.m))
                    continue;
                std::printf("%s, k %d, %d rows, %d tokens: token %d differs from that of a matrix of full panels\n",
                            row->name, p.k, p.m, p.tokens, t);
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
