// Measures the speed of the kernels and compares it with the machine's peak. Kernel and peak measurements alternate, so
// that both run at the same clock and next to the same other work. The best of all repetitions counts.
//
//   kernel_bench [--filter TEXT] [--isa NAME] [--threads N] [--repeat N] [--clock wall|cpu]
//
// --clock cpu counts only CPU time, for machines that run other work.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "format/panel.h"
#include "kernels/select.h"
#include "peak.h"

#if defined(__unix__) || defined(__APPLE__)
#include <time.h>
#endif

namespace {

using namespace agq;

struct options {
    std::string filter, isa, clock = "wall";
    int threads = 2;
    int repeat = 12;
};

double wall_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// CPU time of this thread in seconds: waiting for a core does not count.
double cpu_seconds() {
#if defined(__unix__) || defined(__APPLE__)
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
    return wall_seconds();
#endif
}

/// Runs `work(thread number)` on all threads at once and returns the time in seconds, by the clock in the options.
double run(const options &o, const std::function<void(int)> &work) {
    std::atomic<int> waiting{o.threads};
    std::vector<double> begin(o.threads), end(o.threads), busy(o.threads);
    const auto body = [&](int i) {
        waiting--;
        while (waiting > 0) std::this_thread::yield();
        begin[i] = wall_seconds();
        const double cpu_begin = cpu_seconds();
        work(i);
        busy[i] = cpu_seconds() - cpu_begin;
        end[i] = wall_seconds();
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < o.threads; i++) threads.emplace_back(body, i);
    body(0);
    for (std::thread &t : threads) t.join();
    if (o.clock == "cpu") {
        double sum = 0;
        for (double b : busy) sum += b;
        return sum / o.threads;
    }
    return *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
}

/// GOPS of the peak loop on all threads, over a few milliseconds.
double measure_peak(const options &o, peak::loop loop) {
    if (loop == nullptr) return 0;
    std::atomic<double> operations{0};
    const double seconds = run(o, [&](int) {
        const double done = loop(400000);
        double before = operations;
        while (!operations.compare_exchange_weak(before, before + done)) {
        }
    });
    return operations / seconds * 1e-9;
}

std::atomic<uint64_t> sink{0};

/// Speed of reading `memory` on all threads, in GB/s.
double measure_read(const options &o, const std::vector<half_tile> &memory, peak::fetch ahead) {
    const size_t share = memory.size() * sizeof(half_tile) / o.threads / 256 * 256;
    const char *begin = reinterpret_cast<const char *>(memory.data());
    const double seconds = run(o, [&](int i) { sink += peak::read(begin + i * share, share, ahead); });
    return static_cast<double>(share) * o.threads / seconds * 1e-9;
}

/// Random operands. They are valid; their values do not affect the time.
struct operands {
    std::vector<half_tile> weights;  ///< half tiles, one per group; a pair of them is a tile
    uint8_t codebook[16];
    std::vector<int8_t> q;
    std::vector<int32_t> bias;
    std::vector<float> scale, out;
    std::vector<float *> rows;
    int k, panels, tokens;

    operands(int k_, int panels_, int tokens_, int matrices)
        : weights(static_cast<size_t>(panels_) * (k_ / 64) * matrices),
          q(static_cast<size_t>(k_) * tokens_),
          bias(static_cast<size_t>(k_ / 64) * tokens_),
          scale(static_cast<size_t>(k_ / 64) * tokens_, 0.01f),
          out(static_cast<size_t>(panels_) * 16 * tokens_ + 16),
          k(k_),
          panels(panels_),
          tokens(tokens_) {
        std::mt19937_64 rng(1);
        for (int i = 0; i < 16; i++) codebook[i] = static_cast<uint8_t>(4 + 8 * i);
        for (half_tile &w : weights) {
            for (size_t i = 0; i < sizeof w; i += 8) {
                const uint64_t bits = rng();
                std::memcpy(reinterpret_cast<char *>(&w) + i, &bits, 8);
            }
        }
        const int groups = k / 64;
        for (int p = 0; p < panels * matrices; p++) {
            for (int g = 0; g < groups; g++) {
                const stored_group w = group_of(panel_at(tiles(), p, groups), 16, groups, g);
                std::memset(const_cast<uint8_t *>(w.scale_hi), 0x20, 16);
            }
        }
        for (int8_t &x : q) x = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
        // Results begin at a cache line, as in the host: a line that is split between two stores costs twice as much.
        float *begin = out.data();
        while (reinterpret_cast<uintptr_t>(begin) % 64 != 0) begin++;
        for (int t = 0; t < tokens; t++) rows.push_back(begin + static_cast<size_t>(t) * panels * 16);
    }

    const tile *tiles() const { return reinterpret_cast<const tile *>(weights.data()); }

    /// The product with matrix number i. Threads take panels in turn.
    double multiply(const options &o, const kernel &row, int i, bool per_group, int bits, fetch_ahead ahead = {}) {
        const int units = 8 * o.threads;
        const int step = std::max(1, (panels / row.panel_step + units - 1) / units) * row.panel_step;
        std::atomic<int> next{0};
        const tile *first = panel_at(tiles(), i * panels, k / 64);
        return run(o, [&](int) {
            for (int p; (p = next.fetch_add(step)) < panels;) {
                std::vector<float *> dst(rows);
                for (float *&d : dst) d += p * 16;
                row.gemm({panel_at(first, p, k / 64), k, std::min(step, panels - p), codebook, 1.0f, per_group,
                          q.data(), bias.data(), scale.data(), tokens, dst.data(), bits, ahead});
            }
        });
    }
};

void print(const char *what, const char *detail, double value, const char *unit, double best, const char *of) {
    std::printf("%-10s %-34s %8.1f %-5s", what, detail, value, unit);
    if (best > 0) std::printf(" %5.1f%% of %.1f %s", 100 * value / best, best, of);
    std::printf("\n");
    std::fflush(stdout);
}

void bench_gemm(const options &o, const kernel &row, int m, int k, int tokens, bool per_group, int bits) {
    char detail[80];
    std::snprintf(detail, sizeof detail, "%dx%d, %d tokens%s%s", m, k, tokens, per_group ? "" : ", a scale per token",
                  bits == 4 ? ", 4 bits" : "");
    if ((std::string("gemm ") + detail).find(o.filter) == std::string::npos) return;
    // Use so many matrices that the weights come from memory, as in a model.
    const int matrices = static_cast<int>(80e6 / (static_cast<double>(m) * k * 0.53)) + 1;
    operands data(k, m / 16, tokens, matrices);
    double best = 0, best_peak = 0;
    for (int i = 0; i < o.repeat; i++) {
        best_peak = std::max(best_peak, measure_peak(o, peak::of_kernel(row.name)));
        const double seconds = data.multiply(o, row, i % matrices, per_group, bits);
        best = std::max(best, 2.0 * m * k * tokens / seconds * 1e-9);
    }
    print("gemm", detail, best, "GOPS", best_peak, "GOPS peak");
}

/// A tall matrix of 136 MB, far larger than the caches, times few tokens.
void bench_gemv(const options &o, const kernel &row, int k, int tokens) {
    char detail[80];
    std::snprintf(detail, sizeof detail, "K %d, %d token%s", k, tokens, tokens > 1 ? "s" : "");
    if ((std::string("gemv ") + detail).find(o.filter) == std::string::npos) return;
    const int panels = 250000 / (k / 64);
    operands data(k, panels, tokens, 1);
    const double gigabytes = static_cast<double>(data.weights.size()) * sizeof(half_tile) * 1e-9;
    double best = 0, best_read = 0, by_choice[n_fetch_choices] = {};
    for (int i = 0; i < o.repeat; i++) {
        for (peak::fetch ahead : {peak::fetch{0, 0}, {1024, 0}, {4096, 0}, {0, 16384}, {4096, 16384}}) {
            best_read = std::max(best_read, measure_read(o, data.weights, ahead));
        }
        for (int c = 0; c < n_fetch_choices; c++) {
            by_choice[c] = std::max(by_choice[c], gigabytes / data.multiply(o, row, 0, true, 8, fetch_choices[c]));
        }
    }
    for (double found : by_choice) best = std::max(best, found);
    print("gemv", detail, best, "GB/s", best_read, "GB/s read");
    for (int c = 0; tokens == 1 && c < n_fetch_choices; c++) {
        std::snprintf(detail, sizeof detail, "  asking %d and %d bytes ahead", fetch_choices[c].level1,
                      fetch_choices[c].level2);
        print("", detail, by_choice[c], "GB/s", best_read, "GB/s read");
    }
}

/// A tall matrix of 136 MB in Q8_0 times few tokens.
void bench_q8(const options &o, const kernel &row, int k, int tokens) {
    char detail[80];
    std::snprintf(detail, sizeof detail, "K %d, %d token%s", k, tokens, tokens > 1 ? "s" : "");
    if (!row.q8 || (std::string("q8_0 ") + detail).find(o.filter) == std::string::npos) return;
    const int rows = 4000000 / (k / q8_columns);
    std::vector<half_tile> memory(static_cast<size_t>(rows) * (k / q8_columns) * q8_bytes / sizeof(half_tile) + 1);
    uint8_t *weights = reinterpret_cast<uint8_t *>(memory.data());
    std::mt19937 rng(1);
    for (size_t i = 0; i < memory.size() * sizeof(half_tile); i++) weights[i] = static_cast<uint8_t>(i % 255 & 0x3F);
    std::vector<float> x(static_cast<size_t>(k) * tokens), out(static_cast<size_t>(rows) * tokens);
    for (float &v : x) v = static_cast<float>(static_cast<int>(rng() % 2000) - 1000);
    std::vector<q8_group> packed(x.size() / 64);
    for (int t = 0; t < tokens; t++) row.q8->pack(x.data() + t * k, k, packed.data() + t * (k / 64));
    const double gigabytes = static_cast<double>(memory.size()) * sizeof(half_tile) * 1e-9;
    double best = 0, best_read = 0;
    for (int i = 0; i < o.repeat; i++) {
        best_read = std::max(best_read, measure_read(o, memory, {0, 0}));
        std::atomic<int> next{0};
        const int step = std::max(64, rows / (16 * o.threads));
        const double seconds = run(o, [&](int) {
            std::vector<float *> dst(tokens);
            for (int r; (r = next.fetch_add(step)) < rows;) {
                for (int t = 0; t < tokens; t++) dst[t] = out.data() + static_cast<size_t>(t) * rows + r;
                const uint8_t *first = weights + static_cast<size_t>(r) * (k / q8_columns) * q8_bytes;
                row.q8->multiply({first, k, std::min(step, rows - r), packed.data(), tokens, dst.data()});
            }
        });
        best = std::max(best, gigabytes / seconds);
    }
    print("q8_0", detail, best, "GB/s", best_read, "GB/s read");
}

void bench_quantizer(const options &o, const kernel &row, int k, const char *scale, int n_listed) {
    char detail[80];
    std::snprintf(detail, sizeof detail, "K %d, scale: %s, %d listed", k, scale, n_listed);
    if ((std::string("quantize ") + detail).find(o.filter) == std::string::npos) return;
    const int tokens = 512;
    std::vector<float> x(static_cast<size_t>(k) * tokens);
    std::mt19937 rng(1);
    for (float &v : x) v = static_cast<float>(static_cast<int>(rng() % 2000) - 1000);
    std::vector<uint16_t> listed(static_cast<size_t>(n_listed));
    for (int i = 0; i < n_listed; i++) listed[i] = static_cast<uint16_t>(i * (k / n_listed));
    const std::vector<uint8_t> exponents(k / 64, 1);
    const bool per_group = std::string(scale) != "token";
    const activation_format format = {
        k, 8, per_group, exponents.data(), listed.data(), listed.data(), n_listed, std::string(scale) == "rotated"};
    operands data(k, 1, tokens, 1);
    double best = 0;
    for (int i = 0; i < 3 * o.repeat; i++) {
        std::atomic<int> next{0};
        const double seconds = run(o, [&](int) {
            for (int t; (t = next.fetch_add(row.nr)) < tokens;) {
                const float *rows[64];
                const int n = std::min(row.nr, tokens - t);
                for (int j = 0; j < n; j++) rows[j] = x.data() + static_cast<size_t>(t + j) * k;
                const size_t begin = t;
                row.quantize(format, rows,
                             {data.q.data() + begin * k, data.bias.data() + begin * (k / 64),
                              data.scale.data() + begin * (per_group ? k / 64 : 1), n});
            }
        });
        best = std::max(best, 4.0 * k * tokens / seconds * 1e-9);
    }
    print("quantize", detail, best, "GB/s", 0, "");
}

/// Attention of a block of rows that see all keys. `peak` counts products of bytes: a kernel that multiplies 16-bit
/// integers can reach half of it, a binary32 kernel a quarter.
void bench_attention(const options &o, const kernel &row, int head, int group, int n_keys) {
    char detail[80];
    std::snprintf(detail, sizeof detail, "head %d, %d of them share keys, %d keys", head, group, n_keys);
    if (!row.attention || (std::string("attention ") + detail).find(o.filter) == std::string::npos) return;
    const attention_kernel &kern = *row.attention;
    const int tokens = attention_row_limit / group, rows = tokens * group, blocks = n_keys / attention_keys;
    const size_t key_bytes = kern.key_bytes(head), value_bytes = kern.value_bytes(head);
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> q(static_cast<size_t>(rows * head)), x(static_cast<size_t>(attention_keys * head));
    for (float &v : q) v = normal(rng) * 0.2f;
    for (float &v : x) v = normal(rng);
    struct line {
        alignas(64) char bytes[64];
    };
    std::vector<line> keys(blocks * key_bytes / 64), values(blocks * value_bytes / 64);
    for (int b = 0; b < blocks; b++) {
        kern.pack_keys(x.data(), attention_keys, head, keys.data() + b * key_bytes / 64);
        kern.pack_values(x.data(), attention_keys, head, values.data() + b * value_bytes / 64);
    }
    const std::vector<float> slopes(static_cast<size_t>(group), 1.0f);
    std::vector<std::vector<line>> scratch(o.threads, std::vector<line>(kern.scratch_bytes(head, head) / 64));
    std::vector<std::vector<float>> out(o.threads, std::vector<float>(static_cast<size_t>(rows * head)));
    const int calls = std::max(1, 32768 / n_keys);
    double best = 0, best_peak = 0;
    for (int i = 0; i < o.repeat; i++) {
        best_peak = std::max(best_peak, measure_peak(o, peak::of_kernel(row.name)));
        const double seconds = run(o, [&](int thread) {
            attention_args args = {};
            args.n_tokens = tokens, args.group = group, args.head_qk = args.head_v = head;
            args.q = q.data(), args.n_keys = n_keys, args.keys = keys.data(), args.values = values.data();
            args.slopes = slopes.data(), args.out = out[thread].data(), args.scratch = scratch[thread].data();
            args.out_head_stride = head, args.out_token_stride = static_cast<int64_t>(group) * head;
            for (int call = 0; call < calls; call++) kern.attend(args);
        });
        best = std::max(best, 4e-9 * rows * head * n_keys * calls * o.threads / seconds);
    }
    print("attention", detail, best, "GOPS", best_peak, "GOPS peak");
}

}  // namespace

int main(int argc, char **argv) {
    options o;
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (i + 1 >= argc) {
            std::printf("usage: %s [--filter TEXT] [--isa NAME] [--threads N] [--repeat N] [--clock wall|cpu]\n",
                        argv[0]);
            return 2;
        }
        if (name == "--filter")
            o.filter = argv[++i];
        else if (name == "--isa")
            o.isa = argv[++i];
        else if (name == "--clock")
            o.clock = argv[++i];
        else if (name == "--threads")
            o.threads = std::max(1, std::atoi(argv[++i]));
        else if (name == "--repeat")
            o.repeat = std::max(1, std::atoi(argv[++i]));
        else
            i = argc;
    }
    std::string error;
    const kernel *row = select_kernel(o.isa.c_str(), &error);
    if (row == nullptr) {
        std::printf("%s\n", error.c_str());
        return 2;
    }
    std::printf("kernel %s, %d threads, best of %d, %s clock\n", row->name, o.threads, o.repeat, o.clock.c_str());
    for (const auto &shape : {std::pair<int, int>{2048, 2048}, {5632, 2048}, {2048, 5632}, {11008, 4096}}) {
        bench_gemm(o, *row, shape.first, shape.second, 512, true, 8);
    }
    bench_gemm(o, *row, 2048, 2048, 512, false, 8);
    bench_gemm(o, *row, 2048, 2048, 512, true, 4);
    bench_gemm(o, *row, 2048, 14336, 2048, true, 8);
    for (int tokens : {8, 12, 13, 16, 20, 24, 32, 64, 128}) bench_gemm(o, *row, 5632, 2048, tokens, true, 8);
    // Half tiles, and the next multiples of 128.
    for (int k : {576, 640, 2880, 2944}) bench_gemm(o, *row, 2048, k, 512, true, 8);
    for (int k : {576, 640, 2880, 2944}) bench_gemv(o, *row, k, 1);
    for (int tokens : {1, 2, 4, 8, 12, 16, 24}) bench_gemv(o, *row, 2048, tokens);
    bench_gemv(o, *row, 5632, 1);
    for (int k : {640, 2048}) {
        for (int tokens : {1, 2, 4, 8, 16}) bench_q8(o, *row, k, tokens);
    }
    for (const auto &shape : {std::pair<int, int>{64, 8}, {128, 1}}) {
        bench_attention(o, *row, shape.first, shape.second, 512);
        bench_attention(o, *row, shape.first, shape.second, 4096);
    }
    for (const char *scale : {"token", "group", "rotated"}) bench_quantizer(o, *row, 2048, scale, 0);
    bench_quantizer(o, *row, 2048, "token", 64);
    return 0;
}
