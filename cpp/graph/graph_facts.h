// What the pruning pass needs to know about a graph: numbers for its tensors, its inputs, and where its attentions are.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/flat_map.h"
#include "graph/attention_pattern.h"
#include "host/host.h"

namespace agq {

/// One attention over the K/V cache.
struct attention_site : attention_operands {
    int layer = -1;          ///< of the model; attentions of several layers may read one cache
    int owner = 0;           ///< index of the first attention that reads its cache: its own, unless layers share it
    int first = -1;          ///< the node that reads queries and keys: the flash node, or the product of both
    int masked = -1;         ///< the node that takes the mask: the flash node, or the soft-max
    int last = -1;           ///< the node of the output: the flash node, or the product with the values
    int mask_slot = 0;       ///< which source of `masked` is the mask
    int kind = 0;            ///< index into graph_facts::kinds
    bool is_known = false;   ///< whether the operands determine the weights
    bool is_stored = false;  ///< whether this graph stores keys to its cache
    const ggml_tensor *cache = nullptr;   ///< the keys as a view of the cache; k may be a converted copy of it
    const ggml_tensor *values = nullptr;  ///< the whole cache of values; null if it was not found
};

/// How many positions a token has in models with M-RoPE: time, row and column of an image, and one more. The input
/// holds all tokens' first positions, then all their second ones, and so on.
constexpr int64_t position_sections = 4;

/// Attentions with the same mask. Their caches have the same cells. Models with sliding windows have two kinds.
struct attention_kind {
    const ggml_tensor *mask = nullptr;
    const ggml_tensor *k_cells = nullptr;  ///< the input that names the cells of stored keys; null: none are stored
    int site = 0;                          ///< the first attention of this kind
    const ggml_tensor *v_cells = nullptr;  ///< the input that names the places of stored values, likewise
};

class graph_facts {
  public:
    /// Reads the graph. Throws std::bad_alloc.
    void read(ggml_tensor **nodes, int n);

    /// Number of a tensor: its index if it is a node, n or more for leaves, -1 for tensors of other graphs.
    int number(const ggml_tensor *t) const {
        const int *found = numbers_.find(t);
        return found ? *found : -1;
    }
    /// Number of a node's source, -1 if it has none in that slot.
    int source(int node, int slot) const { return sources_[static_cast<size_t>(node)][static_cast<size_t>(slot)]; }
    int n_nodes = 0;
    std::vector<ggml_tensor *> tensors;  ///< by number
    std::vector<int> last_use;           ///< by number: the last node that reads the tensor, or -1
    std::vector<attention_site> sites;   ///< in graph order
    /// Whether an attention has a cache of its own. If layers share one, it belongs to the first of them.
    bool owns_cache(size_t site) const { return sites[site].owner == static_cast<int>(site); }
    bool complete = false;  ///< whether all sources are leaves or nodes of this graph
    bool is_part = false;   ///< whether the result is in another graph of the host, not in this one

    std::vector<attention_kind> kinds;  ///< in the order of their first sites

    // Inputs, or null. `ambiguous` is set if there are several that must be one, or if a mask or a store of keys
    // belongs to no kind or to several.
    const ggml_tensor *tokens = nullptr, *positions = nullptr, *out_ids = nullptr;
    const ggml_tensor *mask = nullptr, *k_cells = nullptr;  ///< of the first kind
    bool ambiguous = false;
    bool unknown_store = false;  ///< whether keys are stored to cells that no input names

    /// Number of tokens of the ubatch, 0 if the graph computes none.
    int64_t n_tokens() const {
        const ggml_tensor *input = k_cells ? k_cells : tokens ? tokens : positions;
        return input ? input->ne[0] : 0;
    }

    /// The name that newer releases of the host give this input. Older releases leave some inputs without a name; those
    /// are recognized by their use.
    std::string_view input_name(const ggml_tensor *leaf) const;

  private:
    void find_input(const ggml_tensor *node, int slot);
    void find_store(const ggml_tensor *node);
    void find_site(int i);
    void find_kinds();
    void find_values(attention_site *site);

    flat_map<const ggml_tensor *, int> numbers_;
    std::vector<std::array<int, ggml_max_src>> sources_;           ///< by node
    std::unordered_map<const ggml_tensor *, const char *> roles_;  ///< names of inputs that are recognized by their use
    std::vector<const ggml_tensor *> masks_;                       ///< all inputs that are masks
    /// By key cache that is written: the input that names the cells.
    std::vector<std::pair<const ggml_tensor *, const ggml_tensor *>> stores_;
    std::vector<std::pair<const ggml_tensor *, const ggml_tensor *>> value_stores_;  ///< likewise
};

/// Whether the tensor has exactly this name.
bool is_named(const ggml_tensor *t, const char *name);

/// The name; valid as long as the tensor.
std::string_view name_of(const ggml_tensor *t);

/// The tensor whose memory a view shows.
const ggml_tensor *root_of(const ggml_tensor *t);

/// The view of the key cache that `keys` is or was converted from, or null.
const ggml_tensor *find_cache(const ggml_tensor *keys);

/// The layer of a view of the key cache: the first one that reads it.
int cache_layer(const ggml_tensor *cache);

/// The layer N of a tensor whose name begins with `blk.N.`, or -1.
int block_of(const ggml_tensor *t);

}  // namespace agq
