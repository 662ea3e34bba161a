// Compares every rounding kernel that this CPU can run with the generic one (which tests/test_rounding.py compares with
// numpy), bit for bit, over random numbers of rows, codebooks and sizes. Compares the generic one with its result on
// another architecture. Prints its seed; `--seed N` repeats a run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "each_kernel.h"

namespace {

constexpr size_t columns = 64;
constexpr unsigned char guard = 0xA5;  // marks memory that a kernel must not write

template <class element>
using memory = std::vector<element>;

/// Room for n elements, followed by a guard.
template <class element>
memory<element> guarded(size_t n) {
    memory<element> m(n + 64);
    std::memset(m.data(), guard, m.size() * sizeof(element));
    return m;
}

template <class element>
bool equal(const memory<element> &a, const memory<element> &b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(element)) == 0;
}

template <class element>
bool intact(const memory<element> &m) {
    const unsigned char *end = reinterpret_cast<const unsigned char *>(m.data() + m.size());
    return std::all_of(end - 64 * sizeof(element), end, [](unsigned char byte) { return byte == guard; });
}

int failures = 0;

void expect(bool good, const char *kernel, const char *what, size_t n) {
    if (good) return;
    std::printf("%s: %s of %zu rows differs\n", kernel, what, n);
    ++failures;
}

/// All results of one kernel.
struct results {
    memory<float> searched, searched_each, scales, errors, descended_scales, change, rest, grid_errors, grid_change;
    memory<uint8_t> codes, descended_codes, grid_codes, grid_descended;
};

struct problem {
    size_t n;
    memory<float> values, weights, h, hs, upper, inside;

    problem(std::mt19937 &rng, size_t rows, float size) : n(rows) {
        // Sums of integers: equal on every machine, unlike the standard library's distributions.
        const auto normal = [&rng] {
            int32_t sum = 0;
            for (int i = 0; i < 4; ++i) sum += static_cast<int32_t>(rng() & 0xFFFF) - 0x8000;
            return static_cast<float>(sum) * (1.0f / 0x8000);
        };
        const auto fill = [&](memory<float> &m, size_t count, float factor) {
            m.resize(count);
            for (float &v : m) v = normal() * factor;
        };
        fill(values, 16, 30.0f);
        std::sort(values.begin(), values.end());
        fill(weights, columns * n, size);
        for (size_t t = 0; t < n; t += 7) {
            for (size_t j = 0; j < columns; ++j) weights[j * n + t] = 0.0f;  // a row of zeros has the scale 0
        }
        fill(h, columns, 1.0f);
        fill(hs, columns * n, 1.0f);
        for (float &v : h) v *= v;
        for (float &v : hs) v *= v;
        fill(upper, columns * columns, 0.1f);
        memory<float> mixed;
        fill(mixed, columns * columns, 1.0f);
        inside.resize(columns * columns);
        for (size_t i = 0; i < columns; ++i) {
            upper[i * columns + i] = 1.0f + std::fabs(upper[i * columns + i]);
            for (size_t j = 0; j < columns; ++j) {
                double sum = 0;  // exact
                for (size_t k = 0; k < columns; ++k) {
                    sum += static_cast<double>(mixed[k * columns + i]) * mixed[k * columns + j];
                }
                inside[i * columns + j] = static_cast<float>(sum);
            }
        }
    }

    results run(const agq::rounding_kernel &kern) const {
        results r;
        const auto rows = static_cast<int64_t>(n);
        r.searched = r.searched_each = r.scales = guarded<float>(n);
        r.errors = r.change = guarded<float>(columns * n);
        r.codes = guarded<uint8_t>(columns * n);
        kern.search_scales(values.data(), weights.data(), h.data(), false, rows, r.searched.data());
        kern.search_scales(values.data(), weights.data(), hs.data(), true, rows, r.searched_each.data());
        kern.feed_back(values.data(), upper.data(), weights.data(), rows, r.codes.data(), r.scales.data(),
                       r.errors.data());
        r.descended_codes = r.codes;
        r.descended_scales = r.scales;
        kern.descend(values.data(), inside.data(), weights.data(), rows, r.descended_codes.data(),
                     r.descended_scales.data(), r.change.data());
        r.rest = guarded<float>(columns * n);
        std::copy(weights.begin(), weights.end(), r.rest.begin());
        // The rows on the left are parts of longer ones: 60 of them, from the fourth number of the matrix on.
        kern.subtract_product(inside.data() + 4, columns, r.errors.data(), 60, rows, r.rest.data());
        // Costs as steps, so some are large, and the grid's place is anywhere.
        const agq::rounding_grid grid = {static_cast<int64_t>(columns), rows, hs.data(), weights.data(), 31};
        r.grid_errors = r.grid_change = guarded<float>(columns * n);
        r.grid_codes = guarded<uint8_t>(columns * n);
        kern.feed_back_on_grid(grid, upper.data(), r.errors.data(), r.grid_codes.data(), r.grid_errors.data());
        r.grid_descended = r.grid_codes;
        kern.descend_on_grid(grid, inside.data(), weights.data(), r.grid_descended.data(), r.grid_change.data());
        return r;
    }
};

void compare(const char *name, const results &a, const results &b, size_t n) {
    expect(equal(a.searched, b.searched) && intact(b.searched), name, "search_scales", n);
    expect(equal(a.searched_each, b.searched_each) && intact(b.searched_each), name, "search_scales with own costs", n);
    expect(equal(a.codes, b.codes) && equal(a.scales, b.scales) && equal(a.errors, b.errors) && intact(b.codes) &&
               intact(b.scales) && intact(b.errors),
           name, "feed_back", n);
    expect(equal(a.descended_codes, b.descended_codes) && equal(a.descended_scales, b.descended_scales) &&
               equal(a.change, b.change) && intact(b.descended_codes) && intact(b.descended_scales) && intact(b.change),
           name, "descend", n);
    expect(equal(a.rest, b.rest) && intact(b.rest), name, "subtract_product", n);
    expect(equal(a.grid_codes, b.grid_codes) && equal(a.grid_errors, b.grid_errors) && intact(b.grid_codes) &&
               intact(b.grid_errors),
           name, "feed_back_on_grid", n);
    expect(equal(a.grid_descended, b.grid_descended) && equal(a.grid_change, b.grid_change) &&
               intact(b.grid_descended) && intact(b.grid_change),
           name, "descend_on_grid", n);
}

/// FNV-1a hash of the generic kernel's results for a fixed problem.
uint32_t checksum() {
    std::mt19937 rng(1);
    const results r = problem(rng, 100, 1.0f).run(*agq::kernel_scalar.rounding);
    uint32_t hash = 2166136261u;
    const auto add = [&hash](const void *data, size_t bytes) {
        const unsigned char *at = static_cast<const unsigned char *>(data);
        for (size_t i = 0; i < bytes; ++i) hash = (hash ^ at[i]) * 16777619u;
    };
    for (const memory<float> *m : {&r.searched, &r.searched_each, &r.scales, &r.errors, &r.descended_scales, &r.change,
                                   &r.rest, &r.grid_errors, &r.grid_change}) {
        add(m->data(), m->size() * sizeof(float));
    }
    for (const memory<uint8_t> *m : {&r.codes, &r.descended_codes, &r.grid_codes, &r.grid_descended})
        add(m->data(), m->size());
    return hash;
}

constexpr uint32_t known_checksum = 0x539f6654;

}  // namespace

int main(int argc, char **argv) {
    std::set<const agq::rounding_kernel *> tested;
    for_each_kernel(argc, argv, [&tested](const agq::kernel &kern, std::mt19937 &rng) {
        if (!tested.insert(kern.rounding).second) return;  // several kernels share theirs
        for (int round = 0; round < 40; ++round) {
            const size_t n =
                round < 4 ? std::vector<size_t>{1, 31, 32, 33}[static_cast<size_t>(round)] : 1 + rng() % 150;
            const float sizes[] = {1.0f, 300.0f, 1e-3f, 1e12f, 1e-30f, std::numeric_limits<float>::max() / 8};
            const problem given(rng, n, sizes[round % 6]);
            compare(kern.name, given.run(*agq::kernel_scalar.rounding), given.run(*kern.rounding), n);
        }
    });
    const uint32_t found = checksum();
    std::printf("checksum %08x\n", found);
    expect(found == known_checksum, "generic", "the checksum", 100);
    return failures == 0 ? 0 : 1;
}
