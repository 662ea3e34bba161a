// Which rows of keys a pruned run sets to zero: those of tokens that leave, and marks of tokens that wait.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/ubatch.h"
#include "prune/cut_job.h"
#include "prune/early_tokens.h"

namespace agq {

/// Tokens of a part that waits: zeros in all layers behind the first cut, with the mark in the first one of each kind
/// of attention. `mark` must outlive the job. Throws std::bad_alloc.
void mark_deferred(const graph_facts &facts, const ubatch_facts &ubatch, const ubatch_part &part, int first_cut,
                   const std::vector<char> &mark, cut_job *job);

/// Candidates that a question did not choose at this cut or an earlier one are no longer deferred, but dropped, also in
/// kinds of attention that have no layer between the first cut and this one. `cut` is the index of its attention.
/// Throws std::bad_alloc.
void unmark_dropped(const graph_facts &facts, const early_tokens &early, int cut,
                    const std::vector<int32_t> &layer_of_early, cut_job *job);

/// Tokens of the ubatch that were dropped at the cut after this attention. Throws std::bad_alloc.
void clear_dropped(const graph_facts &facts, const ubatch_facts &ubatch, int cut, const std::vector<int32_t> &tokens,
                   cut_job *job);

}  // namespace agq
