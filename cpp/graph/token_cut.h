// Whether the tokens of a graph can be told apart, and where it can be cut between them: what follows from its
// structure.
#pragma once

#include <string>
#include <vector>

#include "graph/dataflow.h"
#include "graph/graph_facts.h"

namespace agq {

/// Why the tokens of this graph cannot be told apart, as far as one sees at first sight; empty if they can.
std::string find_gap(const graph_facts &facts);

/// Finds the attention of a layer, as an index of facts.sites. Returns why there is none that others follow, empty if
/// there is.
std::string find_site(const graph_facts &facts, int layer, int *site);

/// The numbers of the token-indexed tensors that are read behind node `at`, but for the mask. Returns why a cut there
/// cannot choose rows of them, empty if it can. Throws std::bad_alloc.
std::string find_crossing(const graph_facts &facts, const std::vector<token_dim> &dims, int at,
                          std::vector<int> *crossing);

/// Whether a host could look at a tensor of all tokens behind node `first_cut`.
bool is_wanted_whole(const graph_facts &facts, const std::vector<token_dim> &dims, int first_cut);

}  // namespace agq
