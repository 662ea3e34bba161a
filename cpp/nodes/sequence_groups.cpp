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

void sequence_groups::add(const ggml_tensor *mask, const char *rows, int64_t stream, int64_t first, int64_t end) {
    const bool is_f16 = mask->type == ggml_type_f16;
    const size_t element = mask->nb[0];
    const char *at = rows + static_cast<size_t>(first) * mask->nb[1];
    seen_.assign(static_cast<size_t>(mask->ne[0]), 0);
    for (int64_t t = first; t < end; ++t) {
        mask_row(rows + static_cast<size_t>(t) * mask->nb[1], is_f16).mark_visible(mask->ne[0], seen_.data());
    }
    const size_t number = groups_.size();
    key_group &group = groups_.emplace_back();
    group.stream = stream;
    group.first_token = first;
    group.n_tokens = end - first;
    group.mask = at;
    group.mask_stride = mask->nb[1];
    while (cells_.size() <= number) cells_.emplace_back();
    std::vector<int32_t> &cells = cells_[number];
    cells.clear();
    for (size_t c = 0; c < seen_.size(); ++c) {
        if (seen_[c]) cells.push_back(static_cast<int32_t>(c));
    }
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
    char *to = columns.data();
    for (int64_t t = first; t < end; ++t) {
        const char *row = rows + static_cast<size_t>(t) * mask->nb[1];
        for (int32_t c : cells) {
            std::memcpy(to, row + static_cast<size_t>(c) * element, element);
            to += element;
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
