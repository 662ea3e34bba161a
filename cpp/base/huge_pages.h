// Moves memory from small pages into huge ones, in place.
//
// Weights are used from the mapped file, whose pages have 4 KiB. Processors look ahead within a page only, and look up
// the address of each page anew. In pages of 2 MiB the same weights are read faster. Linux gives such pages to memory
// that belongs to no file. So the content is copied there, and the copy takes the place of the mapping at the same
// addresses. Who made the mapping can unmap it as before.
//
// Empty memory that is to be written, as that of keys and values, is given back instead, and comes anew in huge pages.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace agq {

struct memory_range {
    const void *data;
    size_t size;
};

struct huge_pages_result {
    size_t copied = 0;     ///< bytes of files that were copied into huge pages
    size_t collapsed = 0;  ///< bytes of other memory whose pages were joined
    std::string obstacle;  ///< why nothing, or not everything, was moved; empty if all was
};

/// Moves what these ranges of readable memory hold, rounded to whole huge pages, with `n_threads` threads. Other
/// threads may read the memory meanwhile. Unless `always` is set, it leaves files where they are if less than a
/// quarter of the memory would remain available. Throws std::bad_alloc.
huge_pages_result move_to_huge_pages(const std::vector<memory_range> &ranges, int n_threads, bool always);

/// Lets memory that holds nothing but zeros be in huge pages: it is returned to the system, which gives it anew, filled
/// with zeros, when it is used. The ranges belong to the caller, and no other thread writes to them meanwhile. Ranges
/// with a gap of less than a small page are treated as one, provided that the gap holds zeros, too. Returns how many
/// bytes will be in huge pages.
size_t renew_in_huge_pages(const std::vector<memory_range> &ranges);

}  // namespace agq
