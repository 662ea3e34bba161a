// Which tokens of a call belong together, and which cells they see. Attention computes each group by itself. So the
// results of a sequence do not depend on other sequences in the batch or in the cache.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "nodes/attention.h"

namespace agq {

class sequence_groups {
  public:
    /// Divides the first `tokens` tokens of each stream of a mask. `rows` is the mask's data, or a copy of it with more
    /// hidden cells; it must outlive the groups. `own_cells`: the column of each token, or null if it is not known;
    /// then a token belongs to the one before if they see the same cells, but for one more and one less. Throws
    /// std::bad_alloc.
    const std::vector<key_group> &find(const ggml_tensor *mask, const char *rows, int64_t tokens,
                                       const int32_t *own_cells);

  private:
    bool add_one_cell(const ggml_tensor *mask, const char *rows, int64_t tokens);
    void set_columns(const ggml_tensor *mask, const char *rows, size_t number);
    static bool last_sees_all(const ggml_tensor *mask, const char *stream_rows, int64_t first, int64_t tokens,
                              const int32_t *own_cells);
    void mark_seen(const ggml_tensor *mask, const char *rows, int64_t first, int64_t end);
    void add(const ggml_tensor *mask, const char *rows, int64_t stream, int64_t first, int64_t end);
    bool continues(const ggml_tensor *mask, const char *stream_rows, int64_t token, const int32_t *own_cells) const;

    std::vector<key_group> groups_;
    std::vector<uint8_t> seen_;
    std::deque<std::vector<int32_t>> cells_;  ///< by group: those that it sees; kept to reuse their memory
    std::deque<std::vector<char>> masks_;
};

}  // namespace agq
