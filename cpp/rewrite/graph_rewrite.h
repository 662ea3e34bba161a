// Turns a graph of the host into one that its CPU backend can run: custom nodes stand in for all that touches AGQ4.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/thread_memory.h"
#include "host/host.h"
#include "nodes/attention.h"
#include "nodes/product.h"
#include "rewrite/fusion.h"
#include "rewrite/mixed_activations.h"

namespace agq {

/// Whether the node reads an AGQ4 tensor as its weights.
bool uses_agq4(const ggml_tensor *node);

/// Builds and keeps the rewritten graph of one backend instance. Not thread-safe, like a ggml backend.
class graph_rewriter {
  public:
    /// `fuse`: whether work between products may be done where their input is quantized. `take_all`: whether attention
    /// is taken over in graphs without AGQ4, too. `attention`: in place of the kernel's own, and for single tokens,
    /// too; null: none.
    graph_rewriter(const kernel *kern, bool fuse, bool take_all, const activation_settings &activations,
                   const attention_kernel *attention)
        : kern_(kern),
          fuse_(fuse),
          take_all_(take_all),
          activations_(activations),
          attention_(attention ? attention : kern->attention),
          any_length_(attention != nullptr),
          mixed_(activations, kern->attention) {}
    ~graph_rewriter();
    graph_rewriter(const graph_rewriter &) = delete;
    graph_rewriter &operator=(const graph_rewriter &) = delete;

    /// The graph to run in place of the host's nodes. `repeated` says that nodes and their content are those of the
    /// last call, whose graph is then used again; `choices` say for this call which keys attentions look at, and must
    /// stay until the graph has run. On a weight that is damaged or used in a way that is not covered
    /// returns null and `*error` says which. The graph may then run on up to `n_threads` threads. Throws
    /// std::bad_alloc.
    ggml_cgraph *rewrite(ggml_tensor **nodes, int n, bool repeated, const key_choices &choices, int n_threads,
                         std::string *error);

    /// After the graph has run: which of its tokens had 4 bits, for programs that want to know.
    void record_bits() const { mixed_.record(); }

  private:
    /// What becomes of a node of the host's graph.
    enum class role : uint8_t {
        keep,
        product,
        row_lookup,
        fused,         ///< computed by a fused_source that follows
        fused_source,  ///< computed while it is quantized
        flash_attention,
        chain_scores,
        chain_soft_max,
        chain_output
    };

    bool weights_intact() const;
    bool build(ggml_tensor **nodes, int n, std::string *error);
    void assign_roles(ggml_tensor **nodes, int n);
    void find_chain(ggml_tensor **nodes, int output, const std::unordered_map<const ggml_tensor *, int> &position,
                    const std::unordered_map<const ggml_tensor *, int> &uses);
    void add_custom(const ggml_tensor *replaced, ggml_tensor **args, int n_args, const custom_node &node,
                    void *userdata);
    bool add_product(ggml_tensor *node, int i, std::string *error);
    bool add_row_lookup(ggml_tensor *node, std::string *error);
    void assign_fusions(ggml_tensor **nodes, int n);
    bool add_fused_source(ggml_tensor *node, const fusion &fused, ggml_tensor **nodes, std::string *error);
    attention_job &new_attention();
    void add_attention(ggml_tensor *node, attention_job *job);
    void add_clock(const std::string &label);
    /// `i` is the number of the product that reads the set.
    activation_set *find_or_add_set(ggml_tensor *node, int i, const tensor_attributes *attributes);
    activation_set *add_set(ggml_tensor *node, ggml_tensor *x, ggml_tensor *ids, const tensor_attributes *attributes,
                            const row_source *source, const std::vector<uint8_t> *four);
    const tensor_attributes *find_attributes(const ggml_tensor *weights, std::string *error);
    void clear();

    const kernel *kern_;
    bool fuse_, take_all_;
    activation_settings activations_;
    const attention_kernel *attention_;  ///< null: the host's
    bool any_length_;                    ///< whether it is for single tokens, too
    mixed_bits mixed_;
    activation_buffer buffer_;
    std::unordered_map<const void *, tensor_attributes>
        attributes_;  ///< by address of the weights, checked at each use

    std::vector<unsigned char> memory_;
    ggml_context *context_ = nullptr;
    ggml_cgraph *graph_ = nullptr;
    std::vector<role> roles_;
    std::unordered_map<int, attention_job *> jobs_;  ///< by the index of each node that belongs to the job
    std::unordered_map<int, fusion> fusions_;        ///< by the index of their last node
    std::deque<activation_set> sets_;
    std::deque<product> products_;
    std::deque<row_lookup> lookups_;
    std::deque<attention_job> attentions_;
    std::deque<int> clocks_;  ///< kinds of the clock nodes; none unless the graph is profiled
    bool profiled_ = false;
    std::vector<float> saved_queries_, partial_;  ///< of one attention at a time
    size_t thread_bytes_ = 0;                     ///< what the nodes need in each thread
    thread_memory scratch_;
    float sink_[4] = {};  ///< what nodes without an output of their own point at
};

}  // namespace agq
