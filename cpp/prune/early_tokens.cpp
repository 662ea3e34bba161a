#include "prune/early_tokens.h"

#include <algorithm>
#include <cstring>

#include "graph/mask_view.h"
#include "graph/ubatch.h"
#include "prune/token_records.h"

namespace agq {

namespace {

constexpr char mark_byte = 0x53;  // a pattern of signs that turning a row of zeros hardly gives

}  // namespace

std::vector<char> deferral_mark(const key_rows &keys) {
    const ggml_type_traits *traits = host.ggml_get_type_traits(keys.type);
    if (traits->blck_size > 1) {
        // A block begins with its scale, which is zero, and perhaps an offset. It ends with codes.
        std::vector<char> block(traits->type_size, 0);
        block.back() = mark_byte;
        return block;
    }
    std::vector<char> signs(8 * traits->type_size, 0);
    for (size_t i = 0; i < 8; ++i) {
        if (mark_byte >> i & 1) signs[(i + 1) * traits->type_size - 1] = static_cast<char>(0x80);
    }
    return signs;
}

bool is_deferred(const key_rows &keys, int64_t cell, const std::vector<char> &mark, int64_t stream) {
    return std::memcmp(keys.row(cell, stream), mark.data(), mark.size()) == 0 && keys.is_zero(cell, stream);
}

int64_t stream_of(const graph_facts &facts) {
    return cell_offset(facts.sites[0]) / root_of(facts.sites[0].cache)->ne[1];
}

std::string find_value_obstacle(const graph_facts &facts, const std::vector<int32_t> &cells) {
    const ggml_tensor *mask = facts.mask;
    for (int64_t row : {int64_t{0}, mask->ne[1] - 1}) {
        const char *values = static_cast<const char *>(mask->data) + static_cast<size_t>(row) * mask->nb[1];
        const mask_row hides(mask, row, 0);
        for (int64_t c = 0; c < mask->ne[0]; ++c) {
            const bool shows = mask->type == ggml_type_f16 ? reinterpret_cast<const uint16_t *>(values)[c] == 0
                                                           : reinterpret_cast<const float *>(values)[c] == 0;
            if (!shows && !hides.hides(c)) return "attention depends on distances";
        }
    }
    const int64_t n = static_cast<int64_t>(cells.size());
    for (size_t i = static_cast<size_t>(facts.n_nodes); i < facts.tensors.size(); ++i) {
        if (place_of(facts, static_cast<int>(i)) != place_input::value_cells) continue;
        const int64_t *numbers = static_cast<const int64_t *>(facts.tensors[i]->data);
        const int64_t each = facts.tensors[i]->ne[0] / n, step = root_of(facts.sites[0].cache)->ne[1];
        for (int64_t j = 0; j < each; ++j) {
            if (numbers[j] != stream_of(facts) * step * each + cells[0] + j * step)
                return "the cells of values are numbered in an unknown way";
        }
    }
    return "";
}

early_tokens find_early_tokens(const graph_facts &facts, int64_t row, const std::vector<int32_t> &own, size_t site,
                               const hidden_cells &hidden, const token_store &store, size_t row_bytes) {
    struct seen_cell {
        int32_t position, cell;
        const stored_token *token;
    };
    early_tokens found;
    found.stream = stream_of(facts);
    const mask_row mask(facts.mask, row, 0);
    const int64_t n_cells = facts.mask->ne[0];
    const key_rows keys = key_rows::of(facts.sites[site].cache), next = key_rows::of(facts.sites[site + 1].cache);
    std::vector<uint8_t> skip(static_cast<size_t>(n_cells), 0);
    for (int32_t cell : own) skip[static_cast<size_t>(cell)] = 1;
    std::vector<seen_cell> seen;
    for (int64_t c = 0; c < n_cells; ++c) {
        if (mask.hides(c) || skip[static_cast<size_t>(c)]) continue;
        const stored_token *token = store.find(token_fingerprint(keys, c));
        found.is_known = found.is_known && token;
        // What the store has forgotten is older than what it knows.
        seen.push_back({token ? token->position : -1, static_cast<int32_t>(c), token});
    }
    std::stable_sort(seen.begin(), seen.end(), [](const auto &a, const auto &b) { return a.position < b.position; });
    const std::vector<char> mark = deferral_mark(next);
    std::vector<uint8_t> is_missing(static_cast<size_t>(n_cells), 0);
    const int level = hidden.level(static_cast<int>(facts.sites.size()) - 1);
    for (const dropped_cell &d : hidden.cells(level)) {
        // Tokens that were dropped before the first cut cannot be computed.
        is_missing[static_cast<size_t>(d.cell)] = static_cast<size_t>(d.first_layer) > site;
    }
    for (const seen_cell &s : seen) {
        const int32_t place = static_cast<int32_t>(found.cells.size());
        found.cells.push_back(s.cell);
        found.positions.push_back(s.position);
        if (!is_missing[static_cast<size_t>(s.cell)] || !s.token || !s.token->rows()) continue;
        if (s.token->block->row_bytes != row_bytes) continue;
        found.missing.push_back({s.cell, s.position, s.token->id, place, s.token->rows(), s.token->queries(),
                                 is_deferred(next, s.cell, mark)});
    }
    return found;
}

}  // namespace agq
