#include "prune/token_records.h"

namespace agq {

place_input place_of(const graph_facts &facts, int number) {
    if (number < facts.n_nodes) return {};
    const ggml_tensor *leaf = facts.tensors[static_cast<size_t>(number)];
    if (leaf == facts.positions) return {place_input::of::position, 0};
    for (size_t k = 0; k < facts.kinds.size(); ++k) {
        const int kind = static_cast<int>(k);
        if (leaf == facts.kinds[k].k_cells) return {place_input::of::key_cells, kind};
        if (leaf == facts.kinds[k].v_cells) return {place_input::of::value_cells, kind};
    }
    const bool is_value = facts.input_name(leaf) == "attn_inp_v_idxs";
    return is_value ? place_input{place_input::of::value_cells, 0} : place_input{};
}

token_record record_of(const graph_facts &facts, const std::vector<token_dim> &dims, const std::vector<int> &crossing,
                       bool with_inputs) {
    token_record record;
    for (int number : crossing) {
        if (place_of(facts, number).what != place_input::of::none || (number >= facts.n_nodes && !with_inputs))
            continue;
        const ggml_tensor *t = facts.tensors[static_cast<size_t>(number)];
        const token_dim dim = dims[static_cast<size_t>(number)];
        token_record::part part{number, record.bytes, token_bytes(t, dim), 1};
        for (int d = dim.dim + 1; d < 4; ++d) part.blocks *= t->ne[d];
        record.bytes += part.bytes * static_cast<size_t>(part.blocks);
        record.parts.push_back(part);
    }
    return record;
}

void pack_tokens(const token_record &record, const graph_copy &copy, int64_t rows, const std::vector<char *> &records,
                 bool to_tensors, cut_job *job) {
    for (const token_record::part &part : record.parts) {
        char *tensor = static_cast<char *>(copy.current(part.number)->data);
        job->packs.push_back({tensor, part.bytes, part.offset, part.blocks, rows, &records, to_tensors});
    }
}

}  // namespace agq
