#include "prune/cell_rows.h"

#include <cstring>

namespace agq {

cell_rows cell_rows::of(const graph_facts &facts, const attention_site &site, int64_t stream) {
    cell_rows rows;
    const ggml_tensor *keys = root_of(site.cache), *values = site.values;
    const ggml_tensor *places = facts.kinds[static_cast<size_t>(site.kind)].v_cells;
    if (!values || !places || values->ne[1] != keys->ne[1] || facts.n_tokens() == 0) return rows;
    const size_t type_size = host.ggml_get_type_traits(values->type)->type_size;
    const bool is_transposed = places->ne[0] > facts.n_tokens();
    rows.keys_ = static_cast<char *>(keys->data) + static_cast<size_t>(stream) * keys->nb[2];
    rows.values_ = static_cast<char *>(values->data) + static_cast<size_t>(stream) * values->nb[2];
    rows.key_bytes_ = rows.key_stride_ = keys->nb[1];
    rows.value_bytes_ = is_transposed ? type_size : values->nb[1];
    rows.cell_stride_ = rows.value_bytes_;
    rows.piece_stride_ = is_transposed ? type_size * static_cast<size_t>(values->ne[1]) : 0;
    rows.value_pieces_ = is_transposed ? values->ne[0] : 1;
    return rows;
}

cell_rows cell_rows::at(char *keys, char *values) const {
    cell_rows moved = *this;
    moved.keys_ = keys;
    moved.values_ = values;
    return moved;
}

void cell_rows::read(int64_t cell, char *record) const {
    std::memcpy(record, keys(cell), key_bytes_);
    record += key_bytes_;
    for (int64_t i = 0; i < value_pieces_; ++i, record += value_bytes_) {
        std::memcpy(record, values(cell) + static_cast<size_t>(i) * piece_stride_, value_bytes_);
    }
}

void cell_rows::write(int64_t cell, const char *record) const {
    std::memcpy(keys_ + static_cast<size_t>(cell) * key_stride_, record, key_bytes_);
    record += key_bytes_;
    for (int64_t i = 0; i < value_pieces_; ++i, record += value_bytes_) {
        std::memcpy(values(cell) + static_cast<size_t>(i) * piece_stride_, record, value_bytes_);
    }
}

}  // namespace agq
