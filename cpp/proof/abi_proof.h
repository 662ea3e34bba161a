// Proves, each time the plugin is loaded and before anything of the host is touched, that the host is laid out as
// host/host.h declares. There is one function for each thing to prove; abi_proof.cpp has their list.
//
// Not provable, because no function of a host shows it: the numbers of log levels and of device types other than the
// CPU's, and the parameters of the host's public functions. None of them has changed since the oldest release.
#pragma once

#include <string>
#include <vector>

#include "host/loaded_library.h"

namespace agq {

/// Result of one proof.
struct abi_proof {
    const char *name;
    bool passed;
    std::string found;  ///< what was found, and what was expected if that is something else
    double microseconds;
};

/// The proofs in the order in which they were made when the plugin was loaded last. After one that failed no other was
/// made.
const std::vector<abi_proof> &abi_proofs();

/// Makes all proofs, and learns on the way what `host` says differs between releases: `api_version` and the numbers of
/// the operations. Comes after `connect_host`. On failure `*error` says what was found, what was expected and what to
/// do.
bool prove_abi(const loaded_library &library, std::string *error);

/// The last proof, after the type was registered: the host's functions know it.
bool prove_registered_type(std::string *error);

}  // namespace agq
