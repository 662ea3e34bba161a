// Libraries that the process has loaded: which one holds an address, and the functions that it and those it depends on
// offer. The plugin is linked with nothing of the host, and a host's symbols need not be global: a Python extension
// keeps them to itself.
#pragma once

#include <string>

namespace agq {

/// A library, held for as long as the object lives so that it cannot be unloaded meanwhile.
class loaded_library {
  public:
    /// The library or program that holds the address.
    explicit loaded_library(const void *address);
    /// The library that holds the address if a function of this name can be found in it; otherwise what the process
    /// shares among all of its libraries.
    static loaded_library offering(const char *name, const void *address);
    loaded_library(loaded_library &&other) noexcept;
    loaded_library &operator=(loaded_library &&) = delete;
    ~loaded_library();

    /// A function of this name in the library or in those it depends on, or null.
    void *find(const char *name) const;

  private:
    loaded_library() = default;

    void *handle_ = nullptr;  ///< null: what the process shares
};

/// File of the library or program that holds the address; empty if none does.
std::string library_path(const void *address);

/// What tells the library or program that holds the address from all others; null if none does. Costs less than its
/// file.
const void *library_base(const void *address);

}  // namespace agq
