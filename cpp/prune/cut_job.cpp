#include "prune/cut_job.h"

#include <cmath>
#include <cstring>

#include "graph/mask_view.h"

namespace agq {

namespace {

template <typename Element>
void copy_mask_row(const cut_job::mask &m, const char *from_row, char *to_row, Element hidden) {
    const Element *from = reinterpret_cast<const Element *>(from_row);
    Element *to = reinterpret_cast<Element *>(to_row);
    if (m.columns) {
        for (size_t j = 0; j < m.columns->size(); ++j) to[j] = from[(*m.columns)[j]];
    } else {
        std::memcpy(to, from, sizeof(Element) * static_cast<size_t>(m.n_columns));
    }
    if (m.hidden) {
        for (int32_t c : *m.hidden) to[c] = hidden;
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
            if (m.is_f16) {
                copy_mask_row<uint16_t>(m, from, to, hidden_f16);
            } else {
                copy_mask_row<float>(m, from, to, -INFINITY);
            }
        }
    }
    const size_t n = job.clears.size(), part = static_cast<size_t>(ith), parts = static_cast<size_t>(nth);
    for (size_t i = n * part / parts; i < n * (part + 1) / parts; ++i) {
        std::memset(job.clears[i].at, 0, job.clears[i].bytes);
    }
}

}  // namespace agq
