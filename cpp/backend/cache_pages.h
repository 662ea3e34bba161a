// Brings the keys and values of a context into huge pages.
#pragma once

#include <set>

#include "base/environment.h"
#include "host/host.h"

namespace agq {

class cache_pages {
  public:
    explicit cache_pages(huge_pages_mode mode) : mode_(mode) {}

    /// Renews the memory of the caches that these nodes write to, as far as it is empty, unless that was done for this
    /// context. Call before the nodes are computed. Throws std::bad_alloc.
    void renew(ggml_tensor *const *nodes, int n);

  private:
    const huge_pages_mode mode_;
    std::set<const void *> seen_;  ///< caches; they stay where they are as long as the context exists
};

}  // namespace agq
