#include "nodes/sequence_groups.h"

#include <algorithm>
#include <cstring>

#include "base/prefetch.h"
#include "graph/mask_view.h"

namespace agq {

namespace {

struct difference {
    int64_t common = 0, added = 0, lost = 0;
};

template <typename Element>
difference compare(const char *before, const char *after, int64_t n, Element hidden) {
    const Element *a = reinterpret_cast<const Element *>(before), *b = reinterpret_cast<const Element *>(after);
    difference found;
    for (int64_t i = 0; i < n; ++i) {
        const bool sees_before = a[i] != hidden, sees_after = b[i] != hidden;
        found.common += sees_before & sees_after;
        found.added += !sees_before & sees_after;
        found.lost += sees_before & !sees_after;
    }
    return found;
}

template <typename Element>
void gather(const char *row, const std::vector<int32_t> &cells, char *to) {
    const Element *from = reinterpret_cast<const Element *>(row);
    Element *next = reinterpret_cast<Element *>(to);
    for (int32_t c : cells) *next++ = from[c];
}

}  // namespace

bool sequence_groups::continues(const ggml_tensor *mask, const char *stream_rows, int64_t token,
                                const int32_t *own_cells) const {
    const bool is_f16 = mask->type == ggml_type_f16;
    const char *after = stream_rows + static_cast<size_t>(token) * mask->nb[1], *before = after - mask->nb[1];
    if (own_cells) return !mask_row(after, is_f16).hides(own_cells[token - 1]);
    const difference found = is_f16 ? compare<uint16_t>(before, after, mask->ne[0], hidden_f16)
                                    : compare<float>(before, after, mask->ne[0], -INFINITY);
    return found.common > 0 && found.added <= 1 && found.lost <= 1;
}

/// Whether the last token sees all tokens from `first` on, as in one sequence. Reads a single row of the mask.
bool sequence_groups::last_sees_all(const ggml_tensor *mask, const char *stream_rows, int64_t first, int64_t tokens,
                                    const int32_t *own_cells) {
    const mask_row row(stream_rows + static_cast<size_t>(tokens - 1) * mask->nb[1], mask->type == ggml_type_f16);
    return std::none_of(own_cells + first, own_cells + tokens, [&row](int32_t cell) { return row.hides(cell); });
}

/// Marks the cells that any of these tokens sees.
void sequence_groups::mark_seen(const ggml_tensor *mask, const char *rows, int64_t first, int64_t end) {
    const auto row = [&](int64_t token) {
        return mask_row(rows + static_cast<size_t>(token) * mask->nb[1], mask->type == ggml_type_f16);
    };
    seen_.assign(static_cast<size_t>(mask->ne[0]), 0);
    // The first and the last token usually see all that those between them see. Reading a whole mask takes long.
    row(first).mark_visible(0, mask->ne[0], seen_.data());
    if (end - first == 1) return;
    row(end - 1).mark_visible(0, mask->ne[0], seen_.data());
    const int64_t begin_rest = std::find(seen_.begin(), seen_.end(), 0) - seen_.begin();
    const int64_t end_rest = seen_.rend() - std::find(seen_.rbegin(), seen_.rend(), 0);
    if (end_rest <= begin_rest) return;
    mask_row marked = row(first);
    for (int64_t t = first + 1; t < end - 1; ++t) {
        const mask_row ahead = row(std::min(t + mask_rows_ahead, end - 1));
        prefetch(ahead.at(begin_rest));
        prefetch(ahead.at((begin_rest + end_rest) / 2));
        prefetch(ahead.at(end_rest - 1));
        if (row(t).equals(marked, begin_rest, end_rest)) continue;  // most see the same of the rest
        marked = row(t);
        marked.mark_visible(begin_rest, end_rest, seen_.data());
    }
}

void sequence_groups::add(const ggml_tensor *mask, const char *rows, int64_t stream, int64_t first, int64_t end) {
    mark_seen(mask, rows, first, end);
    const size_t number = groups_.size();
    key_group &group = groups_.emplace_back();
    group.stream = stream;
    group.first_token = first;
    group.n_tokens = end - first;
    while (cells_.size() <= number) cells_.emplace_back();
    list_marked(seen_, &cells_[number]);
    if (cells_[number].empty()) cells_[number].push_back(0);  // all rows become 0
    set_columns(mask, rows, number);
}

/// Gives a group, whose cells are known, the columns of its mask.
void sequence_groups::set_columns(const ggml_tensor *mask, const char *rows, size_t number) {
    key_group &group = groups_[number];
    const std::vector<int32_t> &cells = cells_[number];
    group.n = static_cast<int64_t>(cells.size());
    group.first_cell = cells.front();
    const char *first = rows + static_cast<size_t>(group.first_token) * mask->nb[1];
    if (cells.back() - cells.front() + 1 == group.n) {
        group.cells = nullptr;
        group.mask = first + static_cast<size_t>(group.first_cell) * mask->nb[0];
        group.mask_stride = mask->nb[1];
        return;
    }
    group.cells = cells.data();
    group.mask_stride = cells.size() * mask->nb[0];
    while (masks_.size() <= number) masks_.emplace_back();
    std::vector<char> &columns = masks_[number];
    columns.resize(group.mask_stride * static_cast<size_t>(group.n_tokens));
    for (int64_t t = 0; t < group.n_tokens; ++t) {
        const char *row = first + static_cast<size_t>(t) * mask->nb[1];
        char *to = columns.data() + static_cast<size_t>(t) * group.mask_stride;
        if (mask->type == ggml_type_f16) {
            gather<uint16_t>(row, cells, to);
        } else {
            gather<float>(row, cells, to);
        }
    }
    group.mask = columns.data();
}

/// The groups of one token that sees the cells of the token before and one behind them; false if it does not.
bool sequence_groups::add_one_cell(const ggml_tensor *mask, const char *rows, int64_t tokens) {
    if (tokens != 1 || mask->ne[3] != 1 || groups_.size() != 1 || groups_[0].n_tokens != 1) return false;
    if (cells_.empty() || cells_[0].empty()) return false;  // there was no memory for them
    std::vector<int32_t> &cells = cells_[0];
    const mask_row row(rows, mask->type == ggml_type_f16);
    if (cells.back() >= mask->ne[0] || row.count_visible(mask->ne[0]) != static_cast<int64_t>(cells.size()) + 1) {
        return false;
    }
    int64_t last = mask->ne[0] - 1;
    while (row.hides(last)) --last;
    bool all_seen = last > cells.back();
    for (const int32_t c : cells) all_seen &= !row.hides(c);
    if (!all_seen) return false;
    cells.push_back(static_cast<int32_t>(last));
    groups_[0].first_token = groups_[0].stream = 0;
    set_columns(mask, rows, 0);
    return true;
}

const std::vector<key_group> &sequence_groups::find(const ggml_tensor *mask, const char *rows, int64_t tokens,
                                                    const int32_t *own_cells) {
    if (add_one_cell(mask, rows, tokens)) return groups_;
    groups_.clear();
    for (int64_t stream = 0; stream < mask->ne[3]; ++stream) {
        const char *of_stream = rows + static_cast<size_t>(stream) * mask->nb[3];
        for (int64_t first = 0, end; first < tokens; first = end) {
            end = first + 1;
            if (own_cells && last_sees_all(mask, of_stream, first, tokens, own_cells)) end = tokens;
            // With several streams, each has the tokens of one sequence.
            while (end < tokens && (mask->ne[3] > 1 || continues(mask, of_stream, end, own_cells))) ++end;
            add(mask, of_stream, stream, first, end);
        }
    }
    return groups_;
}

}  // namespace agq
