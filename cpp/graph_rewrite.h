// Turns a graph of the host into one that its CPU backend can run: custom nodes stand in for all that touches AGQ4.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "host.h"
#include "matmul.h"

namespace agq {

/// Whether the node reads an AGQ4 tensor as its weights.
bool uses_agq4(const ggml_tensor *node);

/// Builds and keeps the rewritten graph of one backend instance. Not thread-safe, like a ggml backend.
class graph_rewriter {
  public:
    explicit graph_rewriter(const kernel *kern) : kern_(kern) {}
    ~graph_rewriter();
    graph_rewriter(const graph_rewriter &) = delete;
    graph_rewriter &operator=(const graph_rewriter &) = delete;

    /// The graph to run in place of `graph`: itself if it touches no AGQ4 tensor, the kept one if the host repeats a graph,
    /// else a new one. On a weight that is damaged or used in a way that is not covered returns null and `*error` says
    /// which. Throws std::bad_alloc.
    ggml_cgraph *rewrite(ggml_cgraph *graph, std::string *error);

  private:
    /// What the rewritten form of a node depends on, beyond its address.
    struct fingerprint {
        const ggml_tensor *src[3];
        const void *data[4];
        int64_t ne[4];
        size_t nb[3];
        int op;
        int32_t flags;
        attribute_header header;
        bool operator==(const fingerprint &other) const;
    };

    static fingerprint take_fingerprint(const ggml_tensor *node);
    bool is_repeated(ggml_tensor **nodes, int n) const;
    bool build(ggml_tensor **nodes, int n, std::string *error);
    void add_custom(const ggml_tensor *replaced, ggml_tensor **args, int n_args, ggml_custom_op function, void *userdata);
    bool add_product(ggml_tensor *node, std::string *error);
    bool add_row_lookup(ggml_tensor *node, std::string *error);
    activation_set *find_or_add_set(ggml_tensor *node, const tensor_attributes *attributes);
    const tensor_attributes *find_attributes(const ggml_tensor *weights, std::string *error);
    void clear();

    const kernel *kern_;
    activation_buffer buffer_;
    std::unordered_map<const void *, tensor_attributes> attributes_;  ///< by address of the weights, checked at each use

    std::vector<unsigned char> memory_;
    ggml_context *context_ = nullptr;
    ggml_cgraph *graph_ = nullptr;
    std::vector<ggml_tensor *> nodes_;        ///< of the host's graph
    std::vector<int> replaced_;               ///< indices into nodes_, ascending
    std::vector<fingerprint> fingerprints_;   ///< of the replaced nodes
    std::deque<activation_set> sets_;
    std::deque<product> products_;
    std::deque<row_lookup> lookups_;
    float sink_[4] = {};  ///< what nodes without an output of their own point at
};

}  // namespace agq
