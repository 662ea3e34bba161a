// Every kernel this CPU can run against the scalar one, and that one against the formulas of docs/format.md. Random
// shapes from a seed that is printed; `--seed N` repeats a run, `--rounds N` sets its length. Exit code 0 means that
// all agree.
//
// Every operand lies between two pages that may not be touched, flush with one of them, and outputs are compared with
// canaries around them: a kernel that reads or writes outside its operands crashes or is reported.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define AGQ_GUARD_PAGES 1
#endif

#include "../../cpp/kernels/select.h"

namespace {

using namespace agq;

int failures = 0;
std::mt19937_64 rng;

int random_int(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
}
float random_float(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(rng);
}
bool chance(int one_in) {
    return random_int(1, one_in) == 1;
}

/// Reports a failure, the first few at length.
#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition) && ++failures <= 20) {                         \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (0)

// operands between forbidden pages

/// `size` elements that begin right behind, or end right before, a page without access.
template <class T>
class guarded {
  public:
    explicit guarded(size_t size) : size_(size) {
#ifdef AGQ_GUARD_PAGES
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t bytes = (size * sizeof(T) + page - 1) / page * page;
        mapped_bytes_ = bytes + 2 * page;
        void *map = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED ||
            (bytes > 0 && mprotect(static_cast<char *>(map) + page, bytes, PROT_READ | PROT_WRITE) != 0)) {
            std::printf("mmap failed\n");
            std::exit(2);
        }
        mapped_ = static_cast<char *>(map);
        std::memset(mapped_ + page, canary, bytes);
        first_ = mapped_ + page;
        last_ = first_ + bytes;
        data_ = reinterpret_cast<T *>(chance(2) ? first_ : last_ - size * sizeof(T));
#else
        storage_.assign(size * sizeof(T) + 2 * 64, canary);
        first_ = storage_.data();
        last_ = first_ + storage_.size();
        data_ = reinterpret_cast<T *>(first_ + 64);
#endif
    }
    ~guarded() {
#ifdef AGQ_GUARD_PAGES
        munmap(mapped_, mapped_bytes_);
#endif
    }
    guarded(const guarded &) = delete;
    guarded &operator=(const guarded &) = delete;

    T *data() { return data_; }
    const T *data() const { return data_; }
    size_t size() const { return size_; }
    T &operator[](size_t i) { return data_[i]; }
    const T &operator[](size_t i) const { return data_[i]; }

    /// Whether the bytes of the pages around the elements are as they were.
    bool intact() const {
        for (const char *p = first_; p < last_; p++) {
            if (p == reinterpret_cast<const char *>(data_)) p += size_ * sizeof(T);
            if (p < last_ && *p != canary) return false;
        }
        return true;
    }

  private:
    static constexpr char canary = 0x5A;
    size_t size_;
    T *data_;
    char *first_, *last_;
#ifdef AGQ_GUARD_PAGES
    char *mapped_;
    size_t mapped_bytes_;
#else
    std::vector<char> storage_;
#endif
};

bool same_bits(float a, float b) {
    return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

// quantizer

struct quantized {
    std::vector<int8_t> q;      // [k][tokens]
    std::vector<int32_t> bias;  // [k / 64][tokens]
    std::vector<float> scale;   // [k / 64 or 1][tokens]
};

/// Runs a kernel's quantizer block by block and undoes the packing.
quantized run_quantizer(const kernel &row, const activation_format &format, const std::vector<const float *> &rows) {
    const int tokens = static_cast<int>(rows.size());
    const int groups = format.k / 64, scales = format.per_group ? groups : 1;
    quantized result;
    result.q.resize(static_cast<size_t>(format.k) * tokens);
    result.bias.resize(static_cast<size_t>(groups) * tokens);
    result.scale.resize(static_cast<size_t>(scales) * tokens);
    for (int begin = 0; begin < tokens; begin += row.nr) {
        const int n = std::min(row.nr, tokens - begin);
        guarded<int8_t> q(static_cast<size_t>(format.k) * n);
        guarded<int32_t> bias(static_cast<size_t>(groups) * n);
        guarded<float> scale(static_cast<size_t>(scales) * n);
        row.quantize(format, rows.data() + begin, {q.data(), bias.data(), scale.data(), n});
        const int offset = format.bits == 4 ? row.offset4 : 0;
        CHECK(q.intact() && bias.intact() && scale.intact(), "%s: quantizer wrote outside", row.name);
        for (int t = 0; t < n; t++) {
            for (int k = 0; k < format.k; k++) {
                result.q[static_cast<size_t>(k) * tokens + begin + t] =
                    static_cast<int8_t>(q[(k / row.kr * n + t) * row.kr + k % row.kr] - offset);
            }
            for (int g = 0; g < groups; g++) {
                result.bias[static_cast<size_t>(g) * tokens + begin + t] = bias[g * n + t];
            }
            for (int i = 0; i < scales; i++) {
                result.scale[static_cast<size_t>(i) * tokens + begin + t] = scale[i * n + t];
            }
        }
    }
    return result;
}

/// The formulas of docs/format.md once more, in a form that shares nothing with scalar.cpp.
quantized quantize_by_definition(const activation_format &format, const std::vector<const float *> &rows) {
    const int tokens = static_cast<int>(rows.size());
    const int groups = format.k / 64, scales = format.per_group ? groups : 1, span = format.k / scales;
    std::vector<int> order(format.listed, format.listed + format.n_listed);
    for (int c = 0; c < format.k; c++) {
        if (std::find(order.begin(), order.begin() + format.n_listed, c) == order.begin() + format.n_listed) {
            order.push_back(c);
        }
    }
    const float b = format.bits == 8 ? 127.0f : 7.0f;
    quantized result;
    result.q.assign(static_cast<size_t>(format.k) * tokens, 0);
    result.bias.assign(static_cast<size_t>(groups) * tokens, 0);
    result.scale.assign(static_cast<size_t>(scales) * tokens, std::numeric_limits<float>::quiet_NaN());
    for (int t = 0; t < tokens; t++) {
        if (!std::all_of(rows[t], rows[t] + format.k, [](float x) { return std::isfinite(x); })) continue;
        for (int i = 0; i < scales; i++) {
            volatile float amax = 0;
            for (int k = i * span; k < (i + 1) * span; k++) {
                volatile float v = rows[t][order[k]] * std::exp2(-static_cast<float>(format.exponents[k / 64]));
                if (std::fabs(v) > amax) amax = std::fabs(v);
            }
            volatile float s = amax / b, f = b / amax;
            if (amax < std::exp2(-100.0f)) s = f = 0;
            result.scale[static_cast<size_t>(i) * tokens + t] = s;
            for (int k = i * span; k < (i + 1) * span; k++) {
                volatile float v = rows[t][order[k]] * std::exp2(-static_cast<float>(format.exponents[k / 64]));
                v = v * f;
                const double exact = v;
                double nearest = std::floor(exact);
                const double rest = exact - nearest;
                if (rest > 0.5 || (rest == 0.5 && std::fmod(nearest, 2.0) != 0)) nearest += 1;
                const int value = static_cast<int>(std::max(-double(b), std::min(double(b), nearest)));
                result.q[static_cast<size_t>(k) * tokens + t] = static_cast<int8_t>(value);
                result.bias[static_cast<size_t>(k / 64) * tokens + t] -= 64 * value;
            }
        }
    }
    return result;
}

/// One value of a row: mostly ordinary, sometimes a tie of the rounding, tiny or huge.
float random_activation(int kind) {
    switch (kind) {
        case 0:
            return random_float(-1, 1);
        case 1:
            return std::normal_distribution<float>(0, 1)(rng) * (chance(50) ? 100.0f : 1.0f);
        case 2:
            return 0.5f * random_int(-254, 254);  // with amax 127 every second one is a tie
        case 3:
            return std::ldexp(random_float(-1, 1), random_int(-149, 127));
        case 4:
            return std::ldexp(random_float(-1, 1), random_int(-149, -100));
        case 5:
            return chance(2) ? std::numeric_limits<float>::max() : -std::numeric_limits<float>::max();
        case 6:
            return chance(2) ? 0.0f : -0.0f;
        default:
            return std::ldexp(random_float(-1, 1), -118 + random_int(0, 20));  // around the limit of 2^-100
    }
}

void fill_row(float *row, int k) {
    const int kind = random_int(0, 7);
    for (int i = 0; i < k; i++) row[i] = random_activation(kind);
    if (kind == 2) row[random_int(0, k - 1)] = chance(2) ? 127.0f : -127.0f;
    if (kind == 4 && chance(2)) row[random_int(0, k - 1)] = std::ldexp(1.0f, -100);  // just not zero
    if (chance(8)) {
        const float bad[] = {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(),
                             std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
        row[random_int(0, k - 1)] = bad[random_int(0, 3)];
    }
}

void test_quantizers(const std::vector<const kernel *> &kernels) {
    const int k = 128 * random_int(1, chance(4) ? 24 : 6);
    const int tokens = random_int(1, 30);
    guarded<uint8_t> exponents(k / 64);
    for (size_t g = 0; g < exponents.size(); g++) exponents[g] = chance(3) ? random_int(0, 15) : 0;

    int n_listed = 0;
    if (chance(2)) n_listed = chance(4) ? k : chance(3) ? random_int(1, k) : random_int(1, std::min(k, 100));
    std::vector<int> channels(k);
    for (int c = 0; c < k; c++) channels[c] = c;
    std::shuffle(channels.begin(), channels.end(), rng);
    guarded<uint16_t> listed(n_listed), listed_sorted(n_listed);
    std::copy_n(channels.begin(), n_listed, listed.data());
    std::copy_n(channels.begin(), n_listed, listed_sorted.data());
    std::sort(listed_sorted.data(), listed_sorted.data() + n_listed);

    std::vector<std::unique_ptr<guarded<float>>> storage;
    std::vector<const float *> rows;
    for (int t = 0; t < tokens; t++) {
        storage.push_back(std::make_unique<guarded<float>>(k));
        fill_row(storage.back()->data(), k);
        rows.push_back(storage.back()->data());
    }
    const activation_format format = {k,
                                      chance(2) ? 8 : 4,
                                      chance(2),
                                      exponents.data(),
                                      n_listed > 0 ? listed.data() : nullptr,
                                      n_listed > 0 ? listed_sorted.data() : nullptr,
                                      n_listed};
    const quantized want = quantize_by_definition(format, rows);
    for (const kernel *row : kernels) {
        const quantized got = run_quantizer(*row, format, rows);
        const auto where = [&] {
            static char text[100];
            std::snprintf(text, sizeof text, "%s, k %d, %d tokens, %d bits, per_group %d, %d listed", row->name, k,
                          tokens, format.bits, format.per_group, n_listed);
            return text;
        };
        CHECK(got.q == want.q, "%s", where());
        CHECK(got.bias == want.bias, "%s", where());
        bool scales_equal = true;
        for (size_t i = 0; i < want.scale.size(); i++) scales_equal &= same_bits(got.scale[i], want.scale[i]);
        CHECK(scales_equal, "%s", where());
    }
}

// product

/// A product in plain form: matrices by index, nothing packed.
struct problem {
    int k, panels, tokens;
    int bits;
    bool per_group;
    float tensor_scale;
    uint8_t codebook[16];
    std::vector<uint8_t> codes;  // [panels * 16][k]
    std::vector<uint16_t> d;     // [panels * 16][k / 64], binary16 bits
    std::vector<int8_t> q;       // [tokens][k]
    std::vector<float> scale;    // [tokens][k / 64 or 1]

    int rows() const { return panels * 16; }
    int groups() const { return k / 64; }
};

double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const double magnitude =
        exponent == 0 ? std::ldexp(bits & 1023, -24) : std::ldexp((bits & 1023) + 1024, exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

/// Shape, codes, codebook and activations; scales are left to the caller.
problem random_problem() {
    problem p;
    p.k = 128 * random_int(1, chance(4) ? 32 : 5);
    p.panels = random_int(1, 7);
    p.tokens = chance(20) ? random_int(190, 400) : random_int(1, 70);
    if (p.tokens > 70) p.k = std::min(p.k, 1024);
    p.per_group = chance(2);
    p.bits = chance(3) ? 4 : 8;
    p.tensor_scale = 1.0f;
    for (uint8_t &u : p.codebook) u = static_cast<uint8_t>(random_int(0, 127));
    std::sort(p.codebook, p.codebook + 16);
    if (chance(3)) p.codebook[0] = 0, p.codebook[15] = 127;
    if (chance(10)) std::memset(p.codebook, chance(2) ? 0 : 127, 16);

    p.codes.resize(static_cast<size_t>(p.rows()) * p.k);
    const int code_kind = random_int(0, 5);  // 0: all 0, 1: all 15, otherwise random
    for (uint8_t &code : p.codes) code = static_cast<uint8_t>(code_kind < 2 ? 15 * code_kind : random_int(0, 15));
    p.q.resize(static_cast<size_t>(p.tokens) * p.k);
    const int q_kind = random_int(0, 5);  // 0, 1: the extremes, 2: both, otherwise random
    const int b = p.bits == 4 ? 7 : 127;
    for (int8_t &x : p.q) {
        const int value = q_kind == 0 ? b : q_kind == 1 ? -b : q_kind == 2 ? (chance(2) ? b : -b) : random_int(-b, b);
        x = static_cast<int8_t>(value);
    }
    p.d.resize(static_cast<size_t>(p.rows()) * p.groups());
    p.scale.resize(static_cast<size_t>(p.tokens) * (p.per_group ? p.groups() : 1));
    return p;
}

/// Weights in file form; the attribute bytes are noise, which kernels must not look at.
void pack_weights(const problem &p, tile *tiles) {
    for (int m = 0; m < p.rows(); m++) {
        for (int k = 0; k < p.k; k++) {
            tile &w = tiles[m / 16 * (p.k / 128) + k / 128];
            const int c = k % 128, r = m % 16;
            uint8_t &pair = w.codes[c / 8][4 * r + c % 4];
            const int code = p.codes[static_cast<size_t>(m) * p.k + k];
            pair = static_cast<uint8_t>(c % 8 < 4 ? (pair & 0xF0) | code : (pair & 0x0F) | code << 4);
        }
        for (int g = 0; g < p.groups(); g++) {
            tile &w = tiles[m / 16 * (p.k / 128) + g / 2];
            const uint16_t d = p.d[static_cast<size_t>(m) * p.groups() + g];
            w.scale_hi[g % 2][m % 16] = static_cast<uint8_t>(d >> 8);
            uint8_t &low = w.scale_lo[m % 16];
            low = static_cast<uint8_t>(g % 2 == 0 ? (low & 0xF0) | (d >> 4 & 15) : (low & 0x0F) | (d & 0xF0));
        }
    }
    for (int i = 0; i < p.panels * (p.k / 128); i++) {
        for (uint8_t &byte : tiles[i].attributes) byte = static_cast<uint8_t>(random_int(0, 255));
    }
}

/// Result of a kernel, [tokens][rows].
std::vector<float> run_gemm(const kernel &row, const problem &p) {
    guarded<tile> weights(static_cast<size_t>(p.panels) * (p.k / 128));
    pack_weights(p, weights.data());
    const size_t scales = p.per_group ? p.groups() : 1;
    guarded<int8_t> q(p.q.size());
    guarded<int32_t> bias(static_cast<size_t>(p.tokens) * p.groups());
    guarded<float> scale(p.scale.size());
    const int offset = p.bits == 4 ? row.offset4 : 0;
    for (int t = 0; t < p.tokens; t++) {
        const size_t begin = t / row.nr * row.nr, in = t % row.nr;
        const size_t n = std::min<size_t>(row.nr, p.tokens - begin);
        for (int g = 0; g < p.groups(); g++) {
            int sum = 0;
            for (int k = 64 * g; k < 64 * g + 64; k++) {
                const int8_t x = p.q[static_cast<size_t>(t) * p.k + k];
                q[begin * p.k + (k / row.kr * n + in) * row.kr + k % row.kr] = static_cast<int8_t>(x + offset);
                sum += x;
            }
            bias[begin * p.groups() + g * n + in] = -64 * sum;
        }
        for (size_t i = 0; i < scales; i++) scale[begin * scales + i * n + in] = p.scale[t * scales + i];
    }
    guarded<uint8_t> codebook(16);
    std::memcpy(codebook.data(), p.codebook, 16);

    std::vector<std::unique_ptr<guarded<float>>> outputs;
    guarded<float *> dst(p.tokens);
    for (int t = 0; t < p.tokens; t++) {
        outputs.push_back(std::make_unique<guarded<float>>(p.rows()));
        dst[t] = outputs.back()->data();
    }
    row.gemm({weights.data(), p.k, p.panels, codebook.data(), p.tensor_scale, p.per_group, q.data(), bias.data(),
              scale.data(), p.tokens, dst.data(), p.bits});
    std::vector<float> result;
    for (const auto &output : outputs) {
        CHECK(output->intact(), "%s: gemm wrote outside its rows", row.name);
        result.insert(result.end(), output->data(), output->data() + p.rows());
    }
    return result;
}

/// The product in double, and how far a binary32 kernel may be from it: the integers and the cvt are exact; what is
/// left are three products per group, the additions over the groups in any order, and the two final factors.
void product_by_definition(const problem &p, int t, int m, double *value, double *tolerance) {
    double sum = 0, magnitude = 0;
    for (int g = 0; g < p.groups(); g++) {
        int integer = 0;
        for (int k = 64 * g; k < 64 * g + 64; k++) {
            integer +=
                (p.codebook[p.codes[static_cast<size_t>(m) * p.k + k]] - 64) * p.q[static_cast<size_t>(t) * p.k + k];
        }
        double term = integer * half_value(p.d[static_cast<size_t>(m) * p.groups() + g]);
        term *= p.scale[p.per_group ? static_cast<size_t>(t) * p.groups() + g : t];
        sum += term;
        magnitude += std::fabs(term);
    }
    *value = sum * p.tensor_scale;
    *tolerance = magnitude * p.tensor_scale * (p.groups() + 4) * std::ldexp(1.0, -24);
}

void compare_gemm(const std::vector<const kernel *> &kernels, const problem &p, bool exact) {
    std::vector<double> want, tolerance;
    for (int t = 0; t < p.tokens; t++) {
        for (int m = 0; m < p.rows(); m++) {
            double value, allowed;
            product_by_definition(p, t, m, &value, &allowed);
            want.push_back(value);
            tolerance.push_back(exact ? 0.0 : allowed);
        }
    }
    for (const kernel *row : kernels) {
        const std::vector<float> got = run_gemm(*row, p);
        for (size_t i = 0; i < want.size(); i++) {
            const bool agree = std::isnan(want[i]) ? std::isnan(got[i]) : std::fabs(got[i] - want[i]) <= tolerance[i];
            CHECK(agree, "%s, k %d, %d panels, %d tokens, %d bits, per_group %d: token %d row %d is %.9g, not %.9g",
                  row->name, p.k, p.panels, p.tokens, p.bits, p.per_group, int(i) / p.rows(), int(i) % p.rows(), got[i],
                  want[i]);
            if (!agree) break;
        }
    }
}

/// Scales that leave the f32 sums exact, so that equality of the results is equality of the integers: D is 0 or +-1,
/// for at most 16 groups of a row, and |I| <= 64 * 64 * 127 < 2^19, so that every partial sum is an integer below 2^23;
/// the scales of the activations are one power of two.
void test_gemm_exact(const std::vector<const kernel *> &kernels) {
    problem p = random_problem();
    p.tensor_scale = std::ldexp(1.0f, random_int(-20, 20));
    for (int m = 0; m < p.rows(); m++) {
        const int only = chance(2) ? random_int(0, p.groups() - 1) : -1;  // a single group shows its integer as it is
        int used = 0;
        for (int g = 0; g < p.groups(); g++) {
            uint16_t d = 0;
            if (only < 0 ? used < 16 && chance(2) : g == only) d = chance(2) ? 0x3C00 : 0xBC00, used++;
            p.d[static_cast<size_t>(m) * p.groups() + g] = d;
        }
    }
    for (size_t t = 0, n = p.per_group ? p.groups() : 1; t < p.scale.size() / n; t++) {
        const float scale = std::ldexp(1.0f, random_int(-20, 20));
        for (size_t i = 0; i < n; i++) p.scale[t * n + i] = scale;
    }
    compare_gemm(kernels, p, true);
}

/// Any 12-bit scales that the format allows (finite, either sign, subnormal too), any activation scales.
void test_gemm_general(const std::vector<const kernel *> &kernels) {
    problem p = random_problem();
    p.tensor_scale = std::ldexp(random_float(0.5f, 1.0f), random_int(-8, 2));
    const int low = chance(3) ? 0 : 8, high = chance(3) ? 30 : 14;  // range of the exponent field
    for (uint16_t &d : p.d)
        d = static_cast<uint16_t>(random_int(0, 1) << 15 | random_int(low, high) << 10 | random_int(0, 63) << 4);
    const size_t n = p.per_group ? p.groups() : 1;
    for (float &s : p.scale) s = chance(30) ? 0.0f : std::ldexp(random_float(0.5f, 1.0f), random_int(-10, 2));
    if (chance(5)) {  // a token that held a NaN: q = 0, bias = 0, scale NaN
        const size_t t = random_int(0, p.tokens - 1);
        for (int k = 0; k < p.k; k++) p.q[t * p.k + k] = 0;
        for (size_t i = 0; i < n; i++) p.scale[t * n + i] = std::numeric_limits<float>::quiet_NaN();
    }
    compare_gemm(kernels, p, false);
}

// choice of the kernel

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
    // A test run that is told to use one kernel must have used it: CI sets the variable and reads this line.
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
