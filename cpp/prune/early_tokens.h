// The tokens of earlier ubatches that a ubatch sees, and which of them later layers lack but the store still knows.
#pragma once

#include <cstdint>
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

struct early_tokens {
    std::vector<int32_t> cells, positions;  ///< of all earlier tokens that are seen, by position
    std::vector<early_token> missing;       ///< by position
    bool is_known = true;                   ///< whether the store knows the position of every cell
    int64_t stream = 0;                     ///< the part of the cache whose cells these are
};

/// A deferred token's row of keys, in the first layer without it, has a mark: all elements are zero, but some of the
/// first have a minus sign, or a quantized block has another code. So the mark is saved, restored and copied with the
/// cache. Tokens that a question has dropped have zeros without it. This returns the first bytes of a marked row.
/// Throws std::bad_alloc.
std::vector<char> deferral_mark(const key_rows &keys);
bool is_deferred(const key_rows &keys, int64_t cell, const std::vector<char> &mark, int64_t stream = 0);

/// The stream of the cache that a graph with one stream reads.
int64_t stream_of(const graph_facts &facts);

/// The reason why masks and cell numbers of this ubatch cannot be made from positions, empty if they can: the mask must
/// only hide or show, and cells must be numbered as the inputs of this graph do. Throws std::bad_alloc.
std::string find_value_obstacle(const graph_facts &facts, const std::vector<int32_t> &cells);

/// Finds the tokens that token `row` of the ubatch sees, except cells in `own`. `site`: index of the attention of the
/// first pruning layer. `row_bytes`: of records at the first cut; others do not count. Throws std::bad_alloc.
early_tokens find_early_tokens(const graph_facts &facts, int64_t row, const std::vector<int32_t> &own, size_t site,
                               const hidden_cells &hidden, const token_store &store, size_t row_bytes);

}  // namespace agq
