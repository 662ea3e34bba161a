#include "prune/cut_job.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "graph/mask_view.h"
#include "host/tensor_rows.h"

namespace agq {

namespace {

template <typename Element>
void copy_mask_row(const cut_job::mask &m, const char *from_row, char *to_row, bool spared, Element hidden) {
    const Element *from = reinterpret_cast<const Element *>(from_row);
    Element *to = reinterpret_cast<Element *>(to_row);
    if (m.columns) {
        for (size_t j = 0; j < m.columns->size(); ++j) to[j] = from[(*m.columns)[j]];
    } else {
        std::memcpy(to, from, sizeof(Element) * static_cast<size_t>(m.n_columns));
    }
    if (m.hidden && !spared) {
        for (int32_t c : *m.hidden) to[c] = hidden;
    }
}

template <typename Element>
void fill_ordered_row(const cut_job::ordered_mask &m, char *to_row, int32_t from, int32_t seen, Element hidden) {
    Element *to = reinterpret_cast<Element *>(to_row);
    std::fill_n(to, m.n_columns, hidden);
    if (m.columns_only) {
        std::fill(to + from, to + seen, Element{});
    } else {
        for (int32_t i = from; i < seen; ++i) to[(*m.cells)[static_cast<size_t>(i)]] = Element{};
    }
}

void copy_record(const cut_job::pack &p, int64_t i) {
    char *record = (*p.records)[static_cast<size_t>(i)];
    if (!record) return;
    record += p.offset;
    for (int64_t b = 0; b < p.blocks; ++b) {
        char *in_tensor = p.tensor + static_cast<size_t>(b * p.rows + i) * p.bytes;
        char *in_record = record + static_cast<size_t>(b) * p.bytes;
        std::memcpy(p.to_tensor ? in_tensor : in_record, p.to_tensor ? in_record : in_tensor, p.bytes);
    }
}

}  // namespace

void cut_node(ggml_tensor *, int ith, int nth, void *userdata) {
    const cut_job &job = *static_cast<const cut_job *>(userdata);
    for (const cut_job::gather &g : job.gathers) {
        const int64_t rows = static_cast<int64_t>(g.rows->size()), n = rows * g.blocks;
        for (int64_t i = n * ith / nth; i < n * (ith + 1) / nth; ++i) {
            const int64_t source = i / rows * g.source_rows + (*g.rows)[static_cast<size_t>(i % rows)];
            std::memcpy(g.to + static_cast<size_t>(i) * g.bytes, g.from + static_cast<size_t>(source) * g.bytes,
                        g.bytes);
        }
    }
    for (const cut_job::mask &m : job.masks) {
        for (int64_t i = m.n_rows * ith / nth; i < m.n_rows * (ith + 1) / nth; ++i) {
            const int64_t source = m.rows ? (*m.rows)[static_cast<size_t>(i)] : i;
            const char *from = m.from + static_cast<size_t>(source) * m.from_stride;
            char *to = m.to + static_cast<size_t>(i) * m.to_stride;
            const bool spared = m.spared && (*m.spared)[static_cast<size_t>(source)];
            if (m.is_f16) {
                copy_mask_row<uint16_t>(m, from, to, spared, hidden_f16);
            } else {
                copy_mask_row<float>(m, from, to, spared, -INFINITY);
            }
        }
    }
    for (const cut_job::pack &p : job.packs) {
        const int64_t rows = static_cast<int64_t>(p.records->size());
        for (int64_t i = rows * ith / nth; i < rows * (ith + 1) / nth; ++i) copy_record(p, i);
    }
    for (const cut_job::ordered_mask &m : job.ordered_masks) {
        const int64_t rows = static_cast<int64_t>(m.seen->size());
        for (int64_t i = rows * ith / nth; i < rows * (ith + 1) / nth; ++i) {
            char *to = m.to + static_cast<size_t>(i) * m.stride;
            const int32_t seen = (*m.seen)[static_cast<size_t>(i)];
            const int32_t first = m.from ? (*m.from)[static_cast<size_t>(i)] : 0;
            if (m.is_f16) {
                fill_ordered_row<uint16_t>(m, to, first, seen, hidden_f16);
            } else {
                fill_ordered_row<float>(m, to, first, seen, -INFINITY);
            }
        }
    }
    for (const cut_job::cell_numbers &c : job.numbers) {
        const int64_t rows = static_cast<int64_t>(c.cells->size());
        for (int64_t i = rows * ith / nth; i < rows * (ith + 1) / nth; ++i) {
            for (int64_t j = 0; j < c.each; ++j) {
                c.to[i * c.each + j] = c.first + (*c.cells)[static_cast<size_t>(i)] + j * c.step;
            }
        }
    }
    for (const cut_job::queries &q : job.observers) {
        for (int64_t i = q.n * ith / nth; i < q.n * (ith + 1) / nth; ++i) {
            for (int64_t h = 0; h < q.from->ne[2]; ++h) {
                std::memcpy(q.to + i * q.token_stride + h * q.head_stride, row_address(q.from, q.first + i, h, 0),
                            sizeof(float) * static_cast<size_t>(q.from->ne[0]));
            }
        }
    }
    const size_t n = job.clears.size(), part = static_cast<size_t>(ith), parts = static_cast<size_t>(nth);
    for (size_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
        const cut_job::zeros &z = job.clears[i];
        std::memset(z.at, 0, z.bytes);
        if (z.begin) std::memcpy(z.at, z.begin->data(), z.begin->size());
    }
}

}  // namespace agq
