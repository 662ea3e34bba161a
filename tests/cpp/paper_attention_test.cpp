// Compares attention on the paper's grids (cpp/kernels/portable/attention_paper.cpp) with its definition in double
// precision, over random shapes, masks and modes. Prints its seed; `--seed N` repeats a run.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "attention_problem.h"

namespace {

/// Rounds vectors of `width` numbers to 8 bits and back.
void round_vectors(std::vector<float> *values, int width) {
    for (size_t first = 0; first < values->size(); first += static_cast<size_t>(width)) {
        float *x = values->data() + first, largest = 0;
        for (int i = 0; i < width; ++i) largest = std::max(largest, std::fabs(x[i]));
        const float scale = largest / 127;
        for (int i = 0; i < width; ++i) x[i] = scale == 0 ? 0 : std::nearbyint(x[i] / scale) * scale;
    }
}

/// The weight on the grid for a softmax weight; `bits` is its -log2.
double on_grid(double bits) {
    return std::nearbyint(bits) >= 15 ? 0.0 : std::exp2(-std::nearbyint(bits));
}

/// Largest error of a kernel, less the error from weights that may round to either of two powers; infinity if the
/// kernel wrote outside its output.
double largest_excess(const agq::attention_kernel &kern, const problem &p, bool normalized) {
    const std::vector<float> out = run(kern, p);
    if (out.empty()) return INFINITY;
    problem rounded = p;
    round_vectors(&rounded.q, p.head_qk);
    round_vectors(&rounded.k, p.head_qk);
    round_vectors(&rounded.v, p.head_v);
    constexpr double border = 1e-4;
    const size_t head_v = static_cast<size_t>(p.head_v);
    double worst = 0;
    for (int t = 0, row = 0; t < p.tokens; ++t) {
        for (int g = 0; g < p.group; ++g, ++row) {
            const std::vector<double> weights = expected_softmax(p, g, expected_scores(rounded, t, g));
            std::vector<double> want(head_v, 0.0), unsure(head_v, 0.0);
            double sum = 0, left = 1;
            bool any_unsure = false;
            for (size_t j = 0; j < weights.size(); ++j) {
                const double bits = -std::log2(weights[j]), low = on_grid(bits + border), high = on_grid(bits - border);
                sum += on_grid(bits);
                left -= weights[j];
                any_unsure = any_unsure || low != high;
                for (size_t d = 0; d < head_v; ++d) {
                    const double v = rounded.v[j * head_v + d];
                    want[d] += on_grid(bits) * v;
                    unsure[d] += (high - low) * std::fabs(v);
                }
            }
            if (normalized) {
                if (p.has_sinks) sum += std::exp2(-std::nearbyint(-std::log2(left)));
                // If one weight may round either way, all others in its row change, too; so do they with a sink near a
                // border.
                if (any_unsure || p.has_sinks) continue;
                for (double &x : want) x = sum == 0 ? x : x / sum;
            }
            for (size_t d = 0; d < head_v; ++d) {
                const double excess = std::fabs(out[static_cast<size_t>(row) * head_v + d] - want[d]) - unsure[d];
                worst = excess <= worst ? worst : excess == excess ? excess : INFINITY;
            }
        }
    }
    return worst;
}

/// Rows that see a number that is not finite must become NaN.
bool shows_what_is_not_finite(const agq::attention_kernel &kern, std::mt19937 &rng) {
    for (const float bad : {NAN, INFINITY}) {
        for (int where = 0; where < 3; ++where) {
            problem p = random_problem(rng);
            p.has_mask = false;
            (where == 0 ? p.q : where == 1 ? p.k : p.v)[0] = bad;
            const std::vector<float> out = run(kern, p);
            if (out.empty() || std::isfinite(out[0])) {
                std::printf("not finite in part %d: output is %g\n", where,
                            static_cast<double>(out.empty() ? 0 : out[0]));
                return false;
            }
        }
    }
    return true;
}

}  // namespace

int main(int argc, char **argv) {
    unsigned seed = std::random_device{}();
    if (argc == 3 && std::string(argv[1]) == "--seed") seed = static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10));
    std::printf("seed %u\n", seed);
    constexpr double tolerance = 1e-4;
    int failures = 0;
    std::mt19937 rng(seed);
    for (int round = 0; round < 120; ++round) {
        const problem p = random_problem(rng);
        const bool normalized = round % 2 == 1;
        const agq::attention_kernel &kern = normalized ? agq::attention_paper_normalized : agq::attention_paper;
        const double excess = largest_excess(kern, p, normalized);
        if (excess < tolerance) continue;
        std::printf("round %d differs by %g\n", round, excess);
        ++failures;
    }
    failures += !shows_what_is_not_finite(agq::attention_paper, rng);
    failures += !shows_what_is_not_finite(agq::attention_paper_normalized, rng);
    std::printf("scalar and vector code agree with the definition: %s\n", failures == 0 ? "yes" : "no");
    return failures == 0 ? 0 : 1;
}
