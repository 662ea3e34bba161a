// Rewrites a graph of the host so that its CPU backend can run it: custom nodes replace everything that uses AGQ4.
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
#include "nodes/q8_product.h"
#include "rewrite/expert_patterns.h"
#include "rewrite/fusion.h"
#include "rewrite/mixed_activations.h"

namespace agq {

/// Whether the node reads an AGQ4 tensor as its weights.
bool uses_agq4(const ggml_tensor *node);

/// Builds and keeps the rewritten graph of one backend instance. Not thread-safe, like a ggml backend.
class graph_rewriter {
  public:
    /// `fuse`: compute the work between products while their input is quantized. `take_all`: also replace attention in
    /// graphs without AGQ4. `attention`: replaces the kernel's own attention, also for single tokens; null: none.
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

    /// The graph to run instead of the host's nodes. `repeated`: the nodes and their content are those of the last
    /// call, so the last graph is reused. `choices`: which keys the attentions of this call look at; must stay valid
    /// until the graph has run. The graph may run on up to `n_threads` threads. If a weight is damaged or used in an
    /// unsupported way, returns null and sets `*error`. Throws std::bad_alloc.
    ggml_cgraph *rewrite(ggml_tensor **nodes, int n, bool repeated, const key_choices &choices, int n_threads,
                         std::string *error);

    /// Call after the graph has run: records which tokens had 4 bits, for programs that ask.
    void record_bits() const { mixed_.record(); }

  private:
    /// How a node of the host's graph is handled.
    enum class role : uint8_t {
        keep,
        product,
        joined,  ///< computed together with an earlier product
        row_lookup,
        q8_product,
        fused,         ///< computed by the fused_source that follows
        fused_source,  ///< computed while the input of a product is quantized
        expert_choice,
        expert_sum,  ///< weighs and adds the outputs of experts
        flash_attention,
        chain_scores,
        chain_soft_max,
        chain_output
    };

    bool weights_intact();
    bool build(ggml_tensor **nodes, int n, std::string *error);
    void assign_roles(ggml_tensor **nodes, int n);
    void find_chain(ggml_tensor **nodes, int output, const std::unordered_map<const ggml_tensor *, int> &position,
                    const std::unordered_map<const ggml_tensor *, int> &uses);
    void add_custom(const ggml_tensor *replaced, ggml_tensor **args, int n_args, const custom_node &node,
                    void *userdata);
    bool add_product(ggml_tensor **nodes, int n, int i, std::string *error);
    void join_products(ggml_tensor **nodes, int n, int i, product *p);
    void add_q8_product(ggml_tensor *node);
    bool add_row_lookup(ggml_tensor *node, std::string *error);
    void assign_fusions(ggml_tensor **nodes, int n);
    bool add_fused_source(ggml_tensor *node, const fusion &fused, ggml_tensor **nodes, std::string *error);
    void assign_experts(ggml_tensor **nodes, int n);
    void add_expert_choice(ggml_tensor *node, const expert_choice_match &match);
    void add_expert_sum(ggml_tensor *node, const expert_sum_match &match);
    attention_job &new_attention();
    void add_attention(ggml_tensor *node, attention_job *job);
    void add_clock(const std::string &label);
    /// Whether a product, node i, can read the set.
    bool can_share(const activation_set &set, const ggml_tensor *node, int i,
                   const tensor_attributes &attributes) const;
    activation_set *find_or_add_set(ggml_tensor *node, int i, const tensor_attributes *attributes);
    activation_set *add_set(ggml_tensor *node, ggml_tensor *x, ggml_tensor *ids, const tensor_attributes *attributes,
                            const row_source *source, const std::vector<uint8_t> *four);
    const tensor_attributes *find_attributes(const ggml_tensor *weights, std::string *error);
    void clear();

    const kernel *kern_;
    bool fuse_, take_all_;
    activation_settings activations_;
    const attention_kernel *attention_;  ///< null: the host's attention
    bool any_length_;                    ///< whether `attention_` also runs single tokens
    mixed_bits mixed_;
    activation_buffer buffer_;
    std::unordered_map<const void *, tensor_attributes>
        attributes_;  ///< by address of the weights; verified at each use

    size_t checks_ = 0;  ///< calls of weights_intact

    std::vector<unsigned char> memory_;
    ggml_context *context_ = nullptr;
    ggml_cgraph *graph_ = nullptr;
    std::vector<role> roles_;
    std::unordered_map<int, attention_job *> jobs_;         ///< by the index of each node of the job
    std::unordered_map<int, fusion> fusions_;               ///< by the index of its last node
    std::unordered_map<int, expert_sum_match> sums_;        ///< the same
    std::unordered_map<int, expert_choice_match> choices_;  ///< the same
    std::deque<source_rows> source_rows_;
    std::deque<expert_choice> expert_choices_;
    std::deque<expert_sum> expert_sums_;
    std::deque<activation_set> sets_;
    std::deque<product> products_;
    std::deque<q8_product> q8_products_;
    std::deque<row_lookup> lookups_;
    std::deque<attention_job> attentions_;
    std::deque<int> clocks_;  ///< kinds of the clock nodes; empty unless profiling
    bool profiled_ = false;
    std::vector<float> saved_queries_, partial_;  ///< of one attention at a time
    size_t thread_bytes_ = 0;                     ///< scratch memory that the nodes need in each thread
    thread_memory scratch_;
    thread_memory q8_tokens_;  ///< packed tokens of one Q8_0 product at a time, in a single part
    float sink_[4] = {};       ///< data of nodes without their own output
};

}  // namespace agq
