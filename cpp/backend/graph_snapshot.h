// Notices when the host passes the same graph again: the same nodes with the same content.
#pragma once

#include <cstddef>
#include <vector>

#include "host/host.h"

namespace agq {

class graph_snapshot {
  public:
    /// Whether these nodes equal those of the last call, in address and content (names are ignored). Remembers them if
    /// not. Throws std::bad_alloc.
    bool is_repeated(ggml_tensor **nodes, int n);
    void forget() { nodes_.clear(); }

  private:
    std::vector<ggml_tensor *> nodes_;
    std::vector<unsigned char> content_;
};

}  // namespace agq
