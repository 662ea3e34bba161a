// Notices that the host hands in the same graph again: the same nodes, with the same content.
#pragma once

#include <cstddef>
#include <vector>

#include "host/host.h"

namespace agq {

class graph_snapshot {
  public:
    /// Whether these nodes and their content (but for their names) are those of the last call; remembers them if not.
    /// Throws std::bad_alloc.
    bool is_repeated(ggml_tensor **nodes, int n);
    void forget() { nodes_.clear(); }

  private:
    std::vector<ggml_tensor *> nodes_;
    std::vector<unsigned char> content_;
};

}  // namespace agq
