// Proves that the host's layout matches host/host.h, each time the plugin is loaded and before it uses anything of the
// host. There is one function per fact to prove; abi_proof.cpp lists them.
//
// Some facts cannot be proved, because no function of a host shows them: the numbers of log levels, the numbers of
// device types other than the CPU's, and the parameters of the host's public functions. None of them has changed since
// the oldest supported release.
#pragma once

#include <string>
#include <vector>

#include "host/loaded_library.h"

namespace agq {

/// Result of one proof.
struct abi_proof {
    const char *name;
    bool passed;
    std::string found;  ///< what was found and, if different, what was expected
    double microseconds;
};

/// The proofs of the last load, in order. A proof that failed is the last one.
const std::vector<abi_proof> &abi_proofs();

/// Runs all proofs. Also finds what differs between releases and stores it in `host`: `api_version` and the operation
/// numbers. Must run after `connect_host`. On failure `*error` says what was found, what was expected and what to do.
bool prove_abi(const loaded_library &library, std::string *error);

/// The last proof, after the type was registered: the host's functions know the type.
bool prove_registered_type(std::string *error);

}  // namespace agq
