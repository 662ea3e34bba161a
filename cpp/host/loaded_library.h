// Libraries that the process has loaded: finds the one that holds an address, and functions in it and its dependencies.
// The plugin does not link to the host. The host's symbols need not be global: a Python extension keeps them local.
#pragma once

#include <string>

namespace agq {

/// A library. It cannot be unloaded while this object lives.
class loaded_library {
  public:
    /// The library or program that holds the address.
    explicit loaded_library(const void *address);
    /// The library that holds the address, if it or a dependency has a function of this name; otherwise the process's
    /// global symbols.
    static loaded_library offering(const char *name, const void *address);
    loaded_library(loaded_library &&other) noexcept;
    loaded_library &operator=(loaded_library &&) = delete;
    ~loaded_library();

    /// A function of this name in the library or its dependencies, or null.
    void *find(const char *name) const;

  private:
    loaded_library() = default;

    void *handle_ = nullptr;  ///< null: the process's global symbols
};

/// File of the library or program that holds the address; empty if none does.
std::string library_path(const void *address);

/// Identifies the library or program that holds the address; null if none does. Faster than `library_path`.
const void *library_base(const void *address);

}  // namespace agq
