// Whether tokens can be dropped from a graph, and where it can be cut to do so. Both follow from the graph's structure.
#pragma once

#include <string>
#include <vector>

#include "graph/dataflow.h"
#include "graph/graph_facts.h"

namespace agq {

/// A quick check whether the tokens of this graph can be told apart. Returns the reason if not, empty if they can.
std::string find_gap(const graph_facts &facts);

/// Finds the attention of a layer, as an index into facts.sites. Other attentions must follow it. Returns the reason if
/// there is none, empty if there is one.
std::string find_site(const graph_facts &facts, int layer, int *site);

/// Finds the numbers of the token-indexed tensors that are read after node `at`, except masks. Returns empty, or the
/// reason why a cut there cannot select their rows. Throws std::bad_alloc.
std::string find_crossing(const graph_facts &facts, const std::vector<token_dim> &dims, int at,
                          std::vector<int> *crossing);

/// The node with the last layer's states of all tokens, or -1 if the host does not keep them beside those whose logits
/// are wanted. It does so for models with multi-token prediction, whether or not a draft model will read them.
int find_last_states(const graph_facts &facts, const std::vector<token_dim> &dims);

/// Whether a host could read another tensor of all tokens after node `first_cut`.
bool is_wanted_whole(const graph_facts &facts, const std::vector<token_dim> &dims, int first_cut);

}  // namespace agq
