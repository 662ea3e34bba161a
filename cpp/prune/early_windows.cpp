// The part of early_graph for attentions with a window: which tokens are in the side cache.
#include <algorithm>

#include "prune/early_graph.h"

namespace agq {

/// The attentions of a kind that a segment runs, and that have a cache of their own.
std::vector<int> early_graph::sites_of(size_t segment, int kind) const {
    std::vector<int> found;
    const int last = segment < plan_.cuts.size() ? plan_.cuts[segment].site : static_cast<int>(facts_.sites.size()) - 1;
    for (int s = plan_.cuts[segment - 1].site + 1; s <= last; ++s) {
        const size_t site = static_cast<size_t>(s);
        if (facts_.sites[site].kind == kind && facts_.owns_cache(site)) found.push_back(s);
    }
    return found;
}

/// Finds the tokens that the attentions of a segment see.
void early_graph::begin_windows(size_t segment, const std::vector<int32_t> &alive, const hidden_cells &hidden) {
    const early_tokens &tokens = *pass_->tokens_;
    orders_.assign(facts_.sites.size(), {});
    windows_.assign(facts_.kinds.size(), {});
    for (size_t k = 0; k < facts_.kinds.size(); ++k) {
        const int kind = static_cast<int>(k);
        for (int s : sites_of(segment, kind)) {
            std::vector<int32_t> &order = orders_[static_cast<size_t>(s)];
            order = pass_->order_of(hidden, kind, s, alive);
            side_window &window = windows_[k];
            if (kind == tokens.kind || window.is_used) continue;
            window.is_used = true;
            window.order = order;
            window.number.assign(tokens.cells.size(), -1);
            window.loaded.assign(static_cast<size_t>(side_.room(kind)), -1);
            window.is_computed.assign(tokens.cells.size(), 0);
            for (int32_t i : alive) {
                window.is_computed[static_cast<size_t>(tokens.missing[static_cast<size_t>(i)].place)] = 1;
            }
            for (size_t i = 0; i < order.size(); ++i) {
                window.number[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
            }
        }
    }
    for (size_t s = 0; s < orders_.size(); ++s) orders_[s] = orders_[static_cast<size_t>(facts_.sites[s].owner)];
}

/// The cell of a token in the side cache.
int32_t early_graph::side_cell(int kind, int32_t place) const {
    const side_window &window = windows_[static_cast<size_t>(kind)];
    if (!window.is_used) return 0;  // nothing is stored there
    return window.number[static_cast<size_t>(place)] % static_cast<int32_t>(window.loaded.size());
}

/// The number of the first token that a token sees.
int32_t early_graph::first_number(int kind, int32_t place) const {
    const std::vector<int32_t> &order = windows_[static_cast<size_t>(kind)].order;
    const int32_t first = pass_->tokens_->windows[static_cast<size_t>(kind)].first[static_cast<size_t>(place)];
    return static_cast<int32_t>(std::lower_bound(order.begin(), order.end(), first) - order.begin());
}

/// Whether the side cache has room for all that these tokens see together.
bool early_graph::fits_windows(const std::vector<int32_t> &alive, size_t first, size_t end) const {
    const auto place_of = [&](size_t i) { return pass_->tokens_->missing[static_cast<size_t>(alive[i])].place; };
    for (size_t k = 0; k < windows_.size(); ++k) {
        const side_window &window = windows_[k];
        if (!window.is_used) continue;
        int32_t least = window.number[static_cast<size_t>(place_of(end - 1))];
        const int32_t last = least;
        for (size_t i = first; i < end; ++i) least = std::min(least, first_number(static_cast<int>(k), place_of(i)));
        if (last + 1 - least > static_cast<int32_t>(window.loaded.size())) return false;
    }
    return true;
}

/// Reads the keys and values that a token which need not be computed has at an attention.
void early_graph::read_rows(int kind, size_t place, int site, char *record) const {
    const early_window &window = pass_->tokens_->windows[static_cast<size_t>(kind)];
    if (window.cells[place] >= 0) {
        side_.rows_of_host(site, pass_->tokens_->stream).read(window.cells[place], record);
        return;
    }
    const char *kept = window.kept[place]->rows.get();
    for (int s = plan_.cuts[0].site + 1; s < site; ++s) {
        const size_t at = static_cast<size_t>(s);
        if (facts_.sites[at].kind == kind && facts_.owns_cache(at)) kept += side_.rows(s).bytes();
    }
    std::copy_n(kept, side_.rows(site).bytes(), record);
}

/// Puts the tokens that a chunk sees, and that need not be computed, into the side cache.
void early_graph::load_windows(size_t segment, const std::vector<int32_t> &chunk) {
    const early_tokens &tokens = *pass_->tokens_;
    std::vector<char> record;
    for (size_t k = 0; k < windows_.size(); ++k) {
        side_window &window = windows_[k];
        if (!window.is_used) continue;
        const int kind = static_cast<int>(k);
        const std::vector<int> sites = sites_of(segment, kind);
        for (int32_t i : chunk) {
            const int32_t place = tokens.missing[static_cast<size_t>(i)].place;
            const int32_t own = window.number[static_cast<size_t>(place)];
            for (int32_t n = first_number(kind, place); n <= own; ++n) {
                const size_t seen = static_cast<size_t>(window.order[static_cast<size_t>(n)]);
                const int32_t cell = side_cell(kind, static_cast<int32_t>(seen));
                int32_t &loaded = window.loaded[static_cast<size_t>(cell)];
                if (loaded == n) continue;
                loaded = n;
                if (window.is_computed[seen]) continue;
                for (int site : sites) {
                    if (tokens.windows[k].end_site[seen] <= site) break;
                    record.resize(side_.rows(site).bytes());
                    read_rows(kind, seen, site, record.data());
                    side_.rows(site).write(cell, record.data());
                }
            }
        }
    }
}

/// Copies what was computed to the cells that tokens still have in the host's cache.
void early_graph::finish_windows(size_t segment, const std::vector<int32_t> &chunk) {
    const early_tokens &tokens = *pass_->tokens_;
    std::vector<char> record;
    for (size_t k = 0; k < windows_.size(); ++k) {
        if (!windows_[k].is_used) continue;
        const int kind = static_cast<int>(k);
        for (int site : sites_of(segment, kind)) {
            const cell_rows &own = side_.rows(site);
            const cell_rows of_host = side_.rows_of_host(site, tokens.stream);
            record.resize(own.bytes());
            for (int32_t i : chunk) {
                const int32_t place = tokens.missing[static_cast<size_t>(i)].place;
                const int32_t cell = tokens.cell_of(kind, place);
                if (cell < 0) continue;
                own.read(side_cell(kind, place), record.data());
                of_host.write(cell, record.data());
            }
        }
    }
}

}  // namespace agq
