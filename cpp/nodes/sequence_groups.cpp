#include "nodes/sequence_groups.h"

#include <algorithm>
#include <cstring>

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
    for (int64_t t = first + 1; t < end - 1; ++t) row(t).mark_visible(begin_rest, end_rest, seen_.data());
}

void sequence_groups::add(const ggml_tensor *mask, const char *rows, int64_t stream, int64_t first, int64_t end) {
    const size_t element = mask->nb[0];
    const char *at = rows + static_cast<size_t>(first) * mask->nb[1];
    mark_seen(mask, rows, first, end);
    const size_t number = groups_.size();
    key_group &group = groups_.emplace_back();
    group.stream = stream;
    group.first_token = first;
    group.n_tokens = end - first;
    group.mask = at;
    group.mask_stride = mask->nb[1];
    while (cells_.size() <= number) cells_.emplace_back();
    std::vector<int32_t> &cells = cells_[number];
    list_marked(seen_, &cells);
    if (cells.empty()) cells.push_back(0);  // all rows become 0
    group.n = static_cast<int64_t>(cells.size());
    group.first_cell = cells.front();
    if (cells.back() - cells.front() + 1 == group.n) {
        group.mask += static_cast<size_t>(group.first_cell) * element;
        return;
    }
    group.cells = cells.data();
    group.mask_stride = cells.size() * element;
    while (masks_.size() <= number) masks_.emplace_back();
    std::vector<char> &columns = masks_[number];
    columns.resize(group.mask_stride * static_cast<size_t>(group.n_tokens));
    for (int64_t t = first; t < end; ++t) {
        const char *row = rows + static_cast<size_t>(t) * mask->nb[1];
        char *to = columns.data() + static_cast<size_t>(t - first) * group.mask_stride;
        if (mask->type == ggml_type_f16) {
            gather<uint16_t>(row, cells, to);
        } else {
            gather<float>(row, cells, to);
        }
    }
    group.mask = columns.data();
}

const std::vector<key_group> &sequence_groups::find(const ggml_tensor *mask, const char *rows, int64_t tokens,
                                                    const int32_t *own_cells) {
    groups_.clear();
    for (int64_t stream = 0; stream < mask->ne[3]; ++stream) {
        const char *of_stream = rows + static_cast<size_t>(stream) * mask->nb[3];
        for (int64_t first = 0, end; first < tokens; first = end) {
            end = first + 1;
            // With several streams, each has the tokens of one sequence.
            while (end < tokens && (mask->ne[3] > 1 || continues(mask, of_stream, end, own_cells))) ++end;
            add(mask, of_stream, stream, first, end);
        }
    }
    return groups_;
}

}  // namespace agq
