// The importance of tokens as a custom node in front of an attention: computed from queries and keys, because the
// soft-max tensor does not exist with flash attention and is replaced by our attention node without it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "graph/graph_facts.h"
#include "nodes/attention.h"
#include "scores/score.h"

namespace agq {

struct importance_job {
    attention_job attention;  ///< queries, keys and mask of one stream; no values
    prune_score score = prune_score::received;
    std::vector<int32_t> rows;   ///< rows of the queries and of the mask that take part, ascending: tokens still there
    std::vector<int32_t> cells;  ///< the key of each of these tokens
    int32_t first_cell = 0;      ///< the key of the first token of the sequence

    /// Reserves all memory for up to `threads` threads. Throws std::bad_alloc.
    void prepare(int threads);
    /// After the node has run: the importance of each of `rows`, NaN where it is not defined.
    std::vector<float> result() const;

    // Scratch of the node. Sums are fixed-point numbers, so that they do not depend on the order in which threads add.
    thread_memory memory;
    std::vector<std::vector<int64_t>> sums;  ///< by thread and row
    std::vector<int64_t> visible;            ///< keys that each row can see
    std::atomic<int64_t> next{0};
};

/// Fills the fixed part from an attention; returns false if the kernels do not cover it. Nothing is allocated.
bool plan_importance(const attention_site &site, const ggml_tensor *mask, const attention_kernel *kern,
                     attention_job *job);

/// Function of the custom node; `userdata` is the importance_job.
void importance_node(ggml_tensor *dst, int ith, int nth, void *userdata);

}  // namespace agq
