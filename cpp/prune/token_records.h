// What is kept of a token at a cut: its rows of all tensors that nodes after the cut read, one behind another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "graph/dataflow.h"
#include "graph/graph_facts.h"
#include "prune/cut_job.h"
#include "prune/graph_copy.h"

namespace agq {

struct token_record {
    struct part {
        int number;  ///< of the tensor
        size_t offset, bytes;
        int64_t blocks;
        bool operator==(const part &o) const {
            return number == o.number && offset == o.offset && bytes == o.bytes && blocks == o.blocks;
        }
    };
    std::vector<part> parts;
    size_t bytes = 0;

    bool operator==(const token_record &o) const { return bytes == o.bytes && parts == o.parts; }
};

/// The record of a cut with these crossing tensors, without positions and cell numbers, which follow from a token's
/// cell and position. `with_inputs`: other inputs belong to it, too. Throws std::bad_alloc.
token_record record_of(const graph_facts &facts, const std::vector<token_dim> &dims, const std::vector<int> &crossing,
                       bool with_inputs);

/// Appends to `job` the copies between the records and the tensors of `copy`, which have `rows` tokens. `records` must
/// outlive the job. Throws std::bad_alloc.
void pack_tokens(const token_record &record, const graph_copy &copy, int64_t rows, const std::vector<char *> &records,
                 bool to_tensors, cut_job *job);

/// Whether an input holds positions or cell numbers, and of which kind of attention.
struct place_input {
    enum class of : uint8_t { none, position, key_cells, value_cells };
    of what = of::none;
    int kind = 0;
};
place_input place_of(const graph_facts &facts, int number);

}  // namespace agq
