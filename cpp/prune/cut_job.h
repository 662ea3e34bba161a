// The copies needed for a cut through the graph, as one custom node before the next segment. It copies the rows of
// tokens that stay, makes their masks, and zeros the cache for dropped tokens. It runs on all threads.
#pragma once

#include <cstdint>
#include <vector>

#include "host/host.h"

namespace agq {

struct cut_job {
    /// Copies rows of `bytes` bytes: row i of block b goes to `to + (b * rows + i) * bytes` and comes from `from + (b *
    /// source_rows + rows[i]) * bytes`.
    struct gather {
        const char *from;
        char *to;
        size_t bytes;
        int64_t blocks, source_rows;
        const std::vector<int32_t> *rows;
    };
    /// Copies rows of a mask (as above; rows null: all `n_rows`) and sets the columns in `hidden` to -inf, except in
    /// the source rows for which `spared` is set. With `columns`, only those columns are copied, side by side.
    struct mask {
        const char *from;
        char *to;
        size_t from_stride, to_stride;
        int64_t n_rows, n_columns;
        bool is_f16;
        const std::vector<int32_t> *rows;
        const std::vector<int32_t> *hidden;
        const std::vector<int32_t> *columns;
        const std::vector<uint8_t> *spared = nullptr;
    };
    /// Copies between a tensor with `rows` tokens and records of single tokens: block b of token i of the tensor stands
    /// at `tensor + (b * rows + i) * bytes`, and in record i at `offset + b * bytes`. Tokens whose record is null are
    /// skipped.
    struct pack {
        char *tensor;
        size_t bytes, offset;
        int64_t blocks, rows;
        const std::vector<char *> *records;
        bool to_tensor;
    };
    /// A mask in which row i sees the first `seen[i]` of `cells`, from number `from[i]` on (null: from 0). With
    /// `columns_only`, it has only these columns.
    struct ordered_mask {
        char *to;
        size_t stride;
        int64_t n_columns;
        bool is_f16, columns_only;
        const std::vector<int32_t> *cells;
        const std::vector<int32_t> *seen;
        const std::vector<int32_t> *from = nullptr;
    };
    /// Cell numbers for a store: `each` numbers a token, the j-th is `first` plus its cell plus j times `step`.
    struct cell_numbers {
        int64_t *to;
        int64_t first, each, step;
        const std::vector<int32_t> *cells;
    };
    /// Copies the queries of tokens `first` to `first + n - 1`: token t goes to `to + t * token_stride`, and its head h
    /// to h * head_stride behind that. Strides count floats.
    struct queries {
        const ggml_tensor *from;
        float *to;
        int64_t first, n, token_stride, head_stride;
    };
    struct zeros {
        char *at;
        size_t bytes;
        const std::vector<char> *begin = nullptr;  ///< the first bytes, if they are not zero
    };

    std::vector<gather> gathers;
    std::vector<mask> masks;
    std::vector<pack> packs;
    std::vector<ordered_mask> ordered_masks;
    std::vector<cell_numbers> numbers;
    std::vector<queries> observers;
    std::vector<zeros> clears;

    bool empty() const {
        return gathers.empty() && masks.empty() && packs.empty() && ordered_masks.empty() && numbers.empty() &&
               observers.empty() && clears.empty();
    }
};

/// Function of the custom node; `userdata` is the cut_job.
void cut_node(ggml_tensor *dst, int ith, int nth, void *userdata);

}  // namespace agq
