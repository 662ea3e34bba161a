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
    /// Copies rows of a mask (as above; rows null: all `n_rows`) and sets the columns in `hidden` to -inf. With
    /// `columns`, only those columns are copied, side by side.
    struct mask {
        const char *from;
        char *to;
        size_t from_stride, to_stride;
        int64_t n_rows, n_columns;
        bool is_f16;
        const std::vector<int32_t> *rows;
        const std::vector<int32_t> *hidden;
        const std::vector<int32_t> *columns;
    };
    struct zeros {
        char *at;
        size_t bytes;
    };

    std::vector<gather> gathers;
    std::vector<mask> masks;
    std::vector<zeros> clears;

    bool empty() const { return gathers.empty() && masks.empty() && clears.empty(); }
};

/// Function of the custom node; `userdata` is the cut_job.
void cut_node(ggml_tensor *dst, int ith, int nth, void *userdata);

}  // namespace agq
