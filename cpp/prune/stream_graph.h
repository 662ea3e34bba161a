// Graphs for single streams. If each sequence has its own part of the cache (a stream), the host computes those of a
// ubatch in one graph, with as many tokens of each. Copies of its nodes compute one stream after another, each as if
// the host had sent it alone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "graph/dataflow.h"
#include "graph/graph_facts.h"
#include "prune/graph_copy.h"

namespace agq {

class stream_graph {
  public:
    /// Reads the host's graph, which holds several streams. Returns the reason if it cannot be divided, empty if it
    /// can. Throws std::bad_alloc.
    std::string plan(const graph_facts &facts);
    int64_t streams() const { return streams_; }

    /// Copies the inputs of a call, whose memory the first stream may use again. Returns whether the streams can be
    /// told apart by them. Throws std::bad_alloc.
    bool begin();
    /// The nodes of a stream, until the next call. Throws std::bad_alloc.
    std::vector<ggml_tensor *> &nodes(int64_t stream);
    /// What counts the tokens in the graph of a stream, by number. Throws std::bad_alloc.
    std::vector<token_dim> dims() const;
    /// Keeps the results of the stream whose nodes have run. Throws std::bad_alloc.
    void keep_results();
    /// Puts the results of all streams where the host reads them.
    void finish() const;

  private:
    struct result {
        int number;              ///< of the node
        std::vector<char> rows;  ///< of the streams so far
    };

    char *join_sections(const char *first, const ggml_tensor *leaf, token_dim dim);
    void replace_inputs(int64_t stream);
    ggml_tensor *make_node(int i, int64_t stream);

    graph_facts facts_;
    std::vector<token_dim> dims_, outputs_;  ///< by number; what counts tokens, and what counts those that are wanted
    int64_t tokens_ = 0, streams_ = 1, n_outputs_ = 0;
    std::vector<result> results_;
    tensor_arena input_memory_, arena_;
    std::vector<char *> inputs_;      ///< by number: the copy of an input, or null
    std::vector<ggml_tensor *> now_;  ///< by number: the tensor of this stream, or the host's
    std::vector<ggml_tensor *> nodes_;
    int64_t outputs_now_ = 0;  ///< tokens of this stream whose logits are wanted
};

}  // namespace agq
