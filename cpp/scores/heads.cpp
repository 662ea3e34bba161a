#include "scores/heads.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "scores/selection.h"

namespace agq {

namespace {

constexpr int64_t question_tokens = 24, overlap_reach = 32;

/// The sum of all values but NaN. Four sums side by side do not wait for each other.
double sum_of(const std::vector<float> &values) {
    constexpr size_t lanes = 4;
    double sums[lanes] = {};
    const auto add = [&sums](size_t lane, float value) {
        sums[lane] += std::isnan(value) ? 0.0 : static_cast<double>(value);
    };
    size_t i = 0;
    for (; i + lanes <= values.size(); i += lanes) {
        for (size_t lane = 0; lane < lanes; ++lane) add(lane, values[i + lane]);
    }
    for (; i < values.size(); ++i) add(i % lanes, values[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace

void head_probe::prepare(const score_source &source, int threads) {
    weight_visitor::prepare(source, threads);
    largest_.resize(static_cast<size_t>(threads));
    for (auto &part : largest_) part.assign(heads.size() * tokens.cells.size(), 0);
}

bool head_probe::wants(int64_t head, int64_t group) const {
    const auto next = std::lower_bound(heads.begin(), heads.end(), head);
    return next != heads.end() && *next < head + group;
}

void head_probe::visit(const weight_block &block, int ith) {
    std::vector<float> &part = largest_[static_cast<size_t>(ith)];
    const size_t n = tokens.cells.size();
    for (size_t h = 0; h < heads.size(); ++h) {
        const int64_t member = heads[h] - block.head;
        if (member < 0 || member >= block.group) continue;
        float *largest = &part[h * n];
        for (int64_t t = 0; t < block.n_tokens; ++t) {
            const float *row = block.weights + (t * block.group + member) * block.stride;
            // A NaN is not larger than anything, so it counts as 0.
            for (size_t i = 0; i < n; ++i) {
                const int32_t column = columns()[i];
                if (column != no_column && row[column] > largest[i]) largest[i] = row[column];
            }
        }
    }
}

std::vector<float> head_probe::largest(size_t i) const {
    const size_t n = tokens.cells.size();
    std::vector<float> found(n, 0);
    for (const auto &part : largest_) {
        for (size_t t = 0; t < n; ++t) found[t] = std::max(found[t], part[i * n + t]);
    }
    return found;
}

std::vector<float> head_probe::result() const {
    std::vector<float> mean(tokens.cells.size(), 0);
    for (size_t h = 0; h < heads.size(); ++h) {
        const std::vector<float> of_head = largest(h);
        for (size_t t = 0; t < mean.size(); ++t) mean[t] += of_head[t] / static_cast<float>(heads.size());
    }
    return mean;
}

std::vector<float> word_overlap(const std::vector<int32_t> &ids, int tail) {
    const int64_t n = static_cast<int64_t>(ids.size());
    const int64_t question_end = std::max<int64_t>(0, n - tail);
    const int64_t body = std::max<int64_t>(0, question_end - question_tokens);
    std::unordered_map<int32_t, int> occurrences;
    for (int64_t i = body; i < question_end; ++i) occurrences[ids[static_cast<size_t>(i)]] = 0;
    for (int64_t i = 0; i < body; ++i) {
        const auto asked = occurrences.find(ids[static_cast<size_t>(i)]);
        if (asked != occurrences.end()) ++asked->second;
    }
    std::vector<double> before(ids.size() + 1, 0);  // sums of the values of all tokens in front
    for (int64_t i = 0; i < n; ++i) {
        const auto asked = i < body ? occurrences.find(ids[static_cast<size_t>(i)]) : occurrences.end();
        const double value = asked == occurrences.end() ? 0.0 : 1.0 / asked->second;
        before[static_cast<size_t>(i) + 1] = before[static_cast<size_t>(i)] + value;
    }
    std::vector<float> overlap(ids.size());
    for (int64_t i = 0; i < n; ++i) {
        const size_t begin = static_cast<size_t>(std::max<int64_t>(0, i - overlap_reach));
        const size_t end = static_cast<size_t>(std::min<int64_t>(n, i + overlap_reach + 1));
        overlap[static_cast<size_t>(i)] =
            static_cast<float>((before[end] - before[begin]) / static_cast<double>(2 * overlap_reach + 1));
    }
    return overlap;
}

std::vector<float> mean_share(const std::vector<std::vector<float>> &measures, const std::vector<int> &reach,
                              const std::vector<uint8_t> &is_candidate, int64_t n_tokens) {
    std::vector<double> total(is_candidate.size(), 0);
    for (size_t m = 0; m < measures.size(); ++m) {
        std::vector<float> values(measures[m]);
        for (size_t i = 0; i < values.size(); ++i) values[i] = is_candidate[i] ? values[i] : NAN;
        values = spread(values, reach[m]);
        const double sum = sum_of(values);
        if (sum <= 0) continue;
        const double share = 1 / sum;
        for (size_t i = 0; i < values.size(); ++i) total[i] += static_cast<double>(values[i]) * share;
    }
    const double scale = static_cast<double>(n_tokens) / static_cast<double>(std::max<size_t>(1, measures.size()));
    std::vector<float> importance(is_candidate.size(), NAN);
    for (size_t i = 0; i < importance.size(); ++i) {
        if (is_candidate[i]) importance[i] = static_cast<float>(total[i] * scale);
    }
    return importance;
}

const score score_heads = {"heads", 4, score_input::heads, observing_tokens, false, nullptr};

}  // namespace agq
