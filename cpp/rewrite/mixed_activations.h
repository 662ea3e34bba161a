// Mixed activations: the less important tokens of a prompt are quantized to 4 bits, the others to 8 (Agile-Quant,
// section 3.2). One attention determines the importance, for all products after it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "graph/ubatch.h"
#include "nodes/custom_node.h"
#include "scores/score.h"

namespace agq {

/// How activations are quantized, from AGQ_ACT_BITS (docs/mixed-activations.md).
struct activation_settings {
    enum class kind : uint8_t { file, all, mixed };

    kind mode = kind::file;
    int bits = 8;     ///< of all tokens, if mode is `all`
    float share = 0;  ///< the share of tokens that get 4 bits, if mode is `mixed`
    int layer = 1;    ///< the layer whose attention determines the importance
    const score *measure = &score_received;
};

/// Parses "8", "4" or "mixed:SHARE[;layer=N][;score=NAME]"; an empty text means the file's setting. On an error returns
/// false and sets `*error` to a message.
bool parse_activation_settings(const std::string &text, activation_settings *settings, std::string *error);

/// Which tokens of a graph have 4 bits. One object serves one rewritten graph at a time.
class mixed_bits {
  public:
    mixed_bits(const activation_settings &settings, const attention_kernel *kern)
        : settings_(settings), kern_(kern), meter_(settings.measure->make_meter(kern)) {}

    /// Finds the attention and the products after it. Only prompts of one sequence are changed. Throws std::bad_alloc.
    void plan(ggml_tensor **nodes, int n);
    /// Reads the inputs of a call; must run before its graph. Throws std::bad_alloc.
    void begin_call(int n_threads);

    /// The node before which the two custom nodes below must run, or -1.
    int node() const { return node_; }
    /// Whether the input of `product`, node number `i`, has mixed tokens.
    bool covers(const ggml_tensor *product, int i) const;
    /// By token, 1 for 4 bits; valid after choose_bits_node.
    const std::vector<uint8_t> &four() const { return four_; }

    /// Call after the graph has run: stores the result in this thread's `last_call`.
    void record() const;
    /// By token of the calling thread's last call, 1 for 4 bits; empty if its tokens were not mixed.
    static std::vector<uint8_t> &last_call();

  private:
    friend void measure_importance_node(ggml_tensor *dst, int ith, int nth, void *userdata);
    friend void choose_bits_node(ggml_tensor *dst, int ith, int nth, void *userdata);

    activation_settings settings_;
    const attention_kernel *kern_;
    graph_facts facts_;
    ubatch_facts ubatch_;
    std::unique_ptr<score_meter> meter_;
    int node_ = -1, site_ = 0;
    int64_t tokens_ = 0;
    bool active_ = false;  ///< whether this call is mixed
    std::vector<uint8_t> four_, protected_;
};

// Functions of the custom nodes; `userdata` is the mixed_bits.
void measure_importance_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void choose_bits_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node measure_importance{measure_importance_node, false}, choose_bits{choose_bits_node, false};
}  // namespace node

}  // namespace agq
