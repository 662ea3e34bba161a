#include "prune/cell_clears.h"

#include <numeric>

namespace agq {

namespace {

/// Calls `each(rows, kind, is_first, site)` for the caches of the layers behind a cut; is_first: of its kind.
template <typename Function>
void for_layers_behind(const graph_facts &facts, int cut, const Function &each) {
    std::vector<uint8_t> is_known(facts.kinds.size(), 0);
    for (size_t s = static_cast<size_t>(cut) + 1; s < facts.sites.size(); ++s) {
        if (!facts.owns_cache(s)) continue;
        const size_t kind = static_cast<size_t>(facts.sites[s].kind);
        each(key_rows::of(facts.sites[s].cache), kind, is_known[kind] == 0, static_cast<int>(s));
        is_known[kind] = 1;
    }
}

void add(const key_rows &rows, int32_t cell, const std::vector<char> *mark, cut_job *job) {
    job->clears.push_back({const_cast<char *>(rows.row(cell, 0)), rows.row_bytes, mark});
}

/// Cells that are neighbours.
struct cell_run {
    int32_t first, n;
};

std::vector<cell_run> find_runs(const std::vector<int32_t> &tokens, const std::vector<int32_t> &cell_of) {
    std::vector<cell_run> runs;
    for (int32_t token : tokens) {
        const int32_t cell = cell_of[static_cast<size_t>(token)];
        if (!runs.empty() && runs.back().first + runs.back().n == cell) {
            ++runs.back().n;
        } else {
            runs.push_back({cell, 1});
        }
    }
    return runs;
}

/// Clears neighbouring cells at once where their keys stand side by side.
void clear(const key_rows &rows, const std::vector<cell_run> &runs, cut_job *job) {
    for (const cell_run &run : runs) {
        if (rows.row_stride == rows.row_bytes) {
            const size_t bytes = rows.row_bytes * static_cast<size_t>(run.n);
            job->clears.push_back({const_cast<char *>(rows.row(run.first, 0)), bytes});
            continue;
        }
        for (int32_t i = 0; i < run.n; ++i) add(rows, run.first + i, nullptr, job);
    }
}

/// The cells of these tokens, by kind.
std::vector<std::vector<cell_run>> runs_by_kind(const ubatch_facts &ubatch, const std::vector<int32_t> &tokens) {
    std::vector<std::vector<cell_run>> runs;
    runs.reserve(ubatch.cells.size());
    for (const std::vector<int32_t> &cells : ubatch.cells) runs.push_back(find_runs(tokens, cells));
    return runs;
}

}  // namespace

void mark_deferred(const graph_facts &facts, const ubatch_facts &ubatch, const ubatch_part &part, int first_cut,
                   const std::vector<char> &mark, cut_job *job) {
    std::vector<int32_t> tokens(static_cast<size_t>(part.n));
    std::iota(tokens.begin(), tokens.end(), static_cast<int32_t>(part.first));
    const std::vector<std::vector<cell_run>> runs = runs_by_kind(ubatch, tokens);
    for_layers_behind(facts, first_cut, [&](const key_rows &rows, size_t kind, bool is_first, int) {
        if (!is_first) return clear(rows, runs[kind], job);
        for (int32_t t : tokens) add(rows, ubatch.cells[kind][static_cast<size_t>(t)], &mark, job);
    });
}

void unmark_dropped(const graph_facts &facts, const early_tokens &early, int cut,
                    const std::vector<int32_t> &layer_of_early, cut_job *job) {
    for_layers_behind(facts, early.first_cut, [&](const key_rows &rows, size_t kind, bool is_first, int site) {
        for (size_t i = 0; is_first && site > cut && i < early.missing.size(); ++i) {
            if (!early.missing[i].is_deferred || layer_of_early[i] < 0) continue;
            const int32_t cell = early.cell_of(static_cast<int>(kind), early.missing[i].place);
            if (cell >= 0) add(rows, cell, nullptr, job);
        }
    });
}

void clear_dropped(const graph_facts &facts, const ubatch_facts &ubatch, int cut, const std::vector<int32_t> &tokens,
                   cut_job *job) {
    const std::vector<std::vector<cell_run>> runs = runs_by_kind(ubatch, tokens);
    for_layers_behind(facts, cut, [&](const key_rows &rows, size_t kind, bool, int) { clear(rows, runs[kind], job); });
}

}  // namespace agq
