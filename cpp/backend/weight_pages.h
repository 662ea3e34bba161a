// Brings the weights of a context's graphs into huge pages.
#pragma once

#include <set>

#include "base/environment.h"
#include "host/host.h"

namespace agq {

class weight_pages {
  public:
    explicit weight_pages(huge_pages_mode mode) : mode_(mode) {}

    /// Moves the matrices of these nodes, unless that was done for this context, and logs what it did. Call before the
    /// nodes are computed. Throws std::bad_alloc.
    void move(ggml_tensor *const *nodes, int n, int n_threads);

  private:
    const huge_pages_mode mode_;
    std::set<const void *> seen_;  ///< matrices; they stay where they are as long as the context exists
};

}  // namespace agq
