// The tokens of earlier ubatches that a ubatch sees, and which of them later layers lack but the store still knows.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "graph/graph_facts.h"
#include "prune/hidden_cells.h"
#include "prune/token_store.h"

namespace agq {

/// A token that is missing behind some pruning layer and can be computed there after all.
struct early_token {
    int32_t cell, position, id;
    int32_t place;         ///< how many of the visible tokens are in front of it
    const char *rows;      ///< its record at the first cut
    const float *queries;  ///< at the measured attentions up to the first cut, or null
    bool is_deferred;      ///< no question has ranked it yet
};

/// How attentions of a kind that may have a window see the earlier tokens. All vectors are by their place.
struct early_window {
    std::vector<int32_t> cells;     ///< -1: a token has none, or it is not known
    std::vector<int32_t> end_site;  ///< index of the first attention behind the first cut that lacks it; -1: unknown
    std::vector<std::shared_ptr<const kept_window>> kept;  ///< its keys and values, if the cell is not known
    std::vector<int32_t> first;  ///< of missing tokens: the place of the first token that each sees
};

struct early_tokens {
    int kind = 0;                           ///< the kind of attention that sees all of them; cells are of this kind
    int first_cut = 0;                      ///< index of the attention before the first cut
    std::vector<int32_t> cells, positions;  ///< of all earlier tokens that are seen, by position
    std::vector<early_token> missing;       ///< by position
    bool is_known = true;                   ///< whether the store knows the position of every cell
    int64_t stream = 0;                     ///< the part of the cache whose cells these are
    std::vector<early_window> windows;      ///< by kind of attention; empty if there is only one

    /// The cell of a token in a kind of attention; -1 if it has none.
    int32_t cell_of(int of_kind, int32_t place) const {
        const size_t at = static_cast<size_t>(place);
        return of_kind == kind ? cells[at] : windows[static_cast<size_t>(of_kind)].cells[at];
    }
};

/// The attentions that matter to tokens that wait, as indices.
struct waiting_sites {
    int kind = 0;           ///< a kind of attention without a window in this ubatch
    bool is_sure = true;    ///< whether no other kind can be that
    std::vector<int> cuts;  ///< those behind which tokens are dropped, ascending
    std::vector<int> keys;  ///< by kind: the last one up to the first cut, whose keys tell tokens apart
    std::vector<int> next;  ///< by kind: the first one behind the first cut
    int last = 0;           ///< the last one of `kind`
};

/// A deferred token's row of keys, in the first layer without it, has a mark: all elements are zero, but some of the
/// first have a minus sign, or a quantized block has another code. So the mark is saved, restored and copied with the
/// cache. Tokens that a question has dropped have zeros without it. This returns the first bytes of a marked row. With
/// several kinds of attention, there is a mark for each. Throws std::bad_alloc.
std::vector<char> deferral_mark(const key_rows &keys);
bool is_deferred(const key_rows &keys, int64_t cell, const std::vector<char> &mark, int64_t stream = 0);

/// The stream of the cache that a graph with one stream reads.
int64_t stream_of(const graph_facts &facts);

/// The reason why masks and cell numbers of this ubatch cannot be made from positions, empty if they can: the masks
/// must only hide or show, and cells must be numbered as the inputs of this graph do. `cells`: by kind. Throws
/// std::bad_alloc.
std::string find_value_obstacle(const graph_facts &facts, const std::vector<std::vector<int32_t>> &cells);

/// Finds the tokens that token `row` of the ubatch sees, except cells in `own`, by kind. `row_bytes`: of records at the
/// first cut; others do not count. Nor do tokens whose windows need what is no longer known. Throws std::bad_alloc.
early_tokens find_early_tokens(const graph_facts &facts, int64_t row, const std::vector<std::vector<int32_t>> &own,
                               const waiting_sites &sites, const hidden_cells &hidden, const token_store &store,
                               size_t row_bytes);

}  // namespace agq
