// Mixed activations: the less important tokens of a prompt are quantized to 4 bits, the others to 8 (Agile-Quant,
// section 3.2). Importance is that of one attention; it counts for the products behind it.
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
    float share = 0;  ///< of the tokens that get 4 bits, if mode is `mixed`
    int layer = 1;    ///< whose attention tells the importance
    const score *measure = &score_received;
};

/// Reads "8", "4" or "mixed:SHARE[;layer=N][;score=NAME]"; an empty text means what the file says. On
/// a mistake returns false and `*error` says which.
bool parse_activation_settings(const std::string &text, activation_settings *settings, std::string *error);

/// The tokens of a graph by bits. One object serves one rewritten graph at a time.
class mixed_bits {
  public:
    mixed_bits(const activation_settings &settings, const attention_kernel *kern)
        : settings_(settings), kern_(kern), meter_(settings.measure->make_meter(kern)) {}

    /// Looks for the attention and the products behind it. A graph that is no prompt of one sequence stays as it is.
    /// Throws std::bad_alloc.
    void plan(ggml_tensor **nodes, int n);
    /// Reads the inputs of a call before its graph runs. Throws std::bad_alloc.
    void begin_call(int n_threads);

    /// The node in front of which the two nodes below belong, or -1.
    int node() const { return node_; }
    /// Whether the input of this product, node number `i`, has mixed tokens.
    bool covers(const ggml_tensor *product, int i) const;
    /// By token, 1 for those with 4 bits; valid behind choose_bits_node.
    const std::vector<uint8_t> &four() const { return four_; }

    /// After a call: tells `last_call` of this thread what it was.
    void record() const;
    /// By token of the calling thread's last call, 1 for those with 4 bits; empty if its tokens were not mixed.
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
    bool active_ = false;  ///< in this call
    std::vector<uint8_t> four_, protected_;
};

// Functions of the custom nodes; `userdata` is the mixed_bits.
void measure_importance_node(ggml_tensor *dst, int ith, int nth, void *userdata);
void choose_bits_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node measure_importance{measure_importance_node, false}, choose_bits{choose_bits_node, false};
}  // namespace node

}  // namespace agq
