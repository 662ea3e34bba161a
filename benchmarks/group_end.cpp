// What the end of a group costs the AVX-512 kernel for many tokens: loops over two panels and 12 tokens whose operands
// are all in the first-level cache, on one thread, beside the peak of VPDPBUSD. Wants a CPU with AVX-512 VNNI and
// GCC or Clang.
//
//   group_end
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "kernels/portable/unroll.h"
#include "kernels/x86/avx512_intrinsics.h"

namespace {

constexpr int nr = 12, steps = 16, groups = 8;  // tokens, sets of 4 columns in a group, groups in the cache

/// Zeros do: time does not depend on the numbers.
struct operands {
    alignas(64) uint8_t u[groups][steps][2][64];
    alignas(64) float d[groups][2][16];
    alignas(64) int8_t q[groups][steps][nr][4];
    alignas(64) float sums[nr][2][16];
    int32_t bias[groups][nr];
    float scale[groups][nr];
};
operands data;

AGQ_INLINE void multiply(__m512i &sum, __m512i u, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
}

/// Adds D * I of a token to its sums, times its scale if `scaled`.
template <bool scaled>
AGQ_INLINE void add(int t, int g, __m512i first, __m512i second) {
    const __m512i integers[2] = {first, second};
    AGQ_UNROLL
    for (int p = 0; p < 2; p++) {
        const __m512 product = _mm512_cvtepi32_ps(integers[p]), d = _mm512_load_ps(data.d[g][p]);
        const __m512 sum = _mm512_load_ps(data.sums[t][p]);
        _mm512_store_ps(data.sums[t][p],
                        scaled ? _mm512_fmadd_ps(_mm512_mul_ps(product, d), _mm512_set1_ps(data.scale[g][t]), sum)
                               : _mm512_fmadd_ps(product, d, sum));
    }
}

/// Products of `calls` groups. With `adds`, each group is added to the sums while the next one begins. The tokens are
/// in `parts` parts, each of which ends its group 16 / parts steps after the part before it.
template <bool adds, bool scaled, int parts>
double products_per_second(int calls) {
    constexpr int size = nr / parts, late = steps / parts;
    __m512i first[nr], second[nr];
    AGQ_UNROLL
    for (int t = 0; t < nr; t++) first[t] = second[t] = _mm512_setzero_si512();
    const auto begun = std::chrono::steady_clock::now();
    for (int call = 0; call < calls; call++) {
        const int now = call % groups, before = (call + groups - 1) % groups;
        AGQ_UNROLL
        for (int s = 0; s < steps; s++) {
            AGQ_UNROLL
            for (int part = 0; part < parts; part++) {
                const int step = (s - part * late + steps) % steps, g = s < part * late ? before : now;
                const __m512i u0 = _mm512_load_si512(data.u[g][step][0]), u1 = _mm512_load_si512(data.u[g][step][1]);
                AGQ_UNROLL
                for (int t = part * size; t < (part + 1) * size; t++) {
                    if (adds && step == 0) {
                        add<scaled>(t, before, first[t], second[t]);
                        first[t] = second[t] = _mm512_set1_epi32(data.bias[now][t]);
                    }
                    int32_t four;
                    std::memcpy(&four, data.q[g][step][t], sizeof four);
                    const __m512i x = _mm512_set1_epi32(four);
                    multiply(first[t], u0, x);
                    multiply(second[t], u1, x);
                    if (step == 0) asm volatile("" : "+v"(first[t]), "+v"(second[t]) : : "memory");
                }
                asm volatile("" : "+v"(first[part * size]), "+v"(second[part * size]) : : "memory");
            }
        }
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
    AGQ_UNROLL
    for (int t = 0; t < nr; t++) asm volatile("" : : "v"(first[t]), "v"(second[t]));
    return 2.0 * nr * steps * calls / seconds.count();
}

/// Products of registers alone.
double peak(int calls) {
    __m512i sums[2 * nr];
    AGQ_UNROLL
    for (int t = 0; t < nr; t++) sums[t] = sums[nr + t] = _mm512_setzero_si512();
    const __m512i x = _mm512_setzero_si512();
    const auto begun = std::chrono::steady_clock::now();
    for (int call = 0; call < calls * steps; call++) {
        AGQ_UNROLL
        for (int t = 0; t < nr; t++) multiply(sums[t], x, x), multiply(sums[nr + t], x, x);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begun;
    AGQ_UNROLL
    for (int t = 0; t < nr; t++) asm volatile("" : : "v"(sums[t]), "v"(sums[nr + t]));
    return 2.0 * nr * steps * calls / seconds.count();
}

}  // namespace

int main() {
    struct row {
        const char *what;
        double (*loop)(int calls);
        double best;
    } rows[] = {
        {"registers alone", peak, 0},
        {"loads, broadcasts and products", products_per_second<false, false, 1>, 0},
        {"and FMAs at the end of a group", products_per_second<true, false, 1>, 0},
        {"the same, in two parts", products_per_second<true, false, 2>, 0},
        {"and the scale of a token", products_per_second<true, true, 1>, 0},
        {"the same, in two parts", products_per_second<true, true, 2>, 0},
    };
    for (int repetition = 0; repetition < 7; repetition++) {
        for (row &r : rows) r.best = std::max(r.best, r.loop(300000));
    }
    for (const row &r : rows) {
        std::printf("%-32s %6.2f billion products/s %6.1f%%\n", r.what, r.best * 1e-9, 100 * r.best / rows[0].best);
    }
    return 0;
}
