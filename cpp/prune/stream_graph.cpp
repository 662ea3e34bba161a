#include "prune/stream_graph.h"

#include <algorithm>
#include <cstring>

#include "host/tensor_rows.h"

namespace agq {

namespace {

/// Whether a leaf is an input of the graph, not a part of the model or its cache.
bool is_input(const ggml_tensor *leaf, const ggml_backend_buffer *buffer) {
    return (leaf->flags & ggml_flag_input) || leaf->buffer == buffer;
}

}  // namespace

std::string stream_graph::plan(const graph_facts &facts) {
    facts_ = facts;
    tokens_ = facts.n_tokens();
    streams_ = facts.mask->ne[3];
    n_outputs_ = facts.out_ids ? facts.out_ids->ne[0] : 0;
    results_.clear();
    std::string reason;
    if (!facts.complete || facts.ambiguous || !facts.out_ids || tokens_ % streams_ != 0) {
        return "the host computes the graph of several streams in parts";
    }
    if (!trace_tokens(facts_, tokens_, &dims_, &reason)) return reason;
    outputs_.assign(facts_.tensors.size(), {});
    if (n_outputs_ > 0 && !trace_outputs(facts_, n_outputs_, &outputs_, &reason)) return reason;
    for (size_t i = static_cast<size_t>(facts_.n_nodes); i < facts_.tensors.size(); ++i) {
        if (dims_[i] && !is_contiguous(facts_.tensors[i])) return "an input has an unexpected shape";
    }
    for (int i = 0; i < facts_.n_nodes; ++i) {
        const ggml_tensor *t = facts_.tensors[static_cast<size_t>(i)];
        const bool is_result = (t->flags & ggml_flag_output) || i + 1 == facts_.n_nodes;
        if (!is_result || (n_outputs_ == 0 && !dims_[static_cast<size_t>(i)])) continue;
        if (!(outputs_[static_cast<size_t>(i)] == token_dim{1, 1}) || t->ne[2] != 1 || t->ne[3] != 1 || t->view_src) {
            return "the host requests a tensor of all tokens";
        }
        results_.push_back({i, {}});
    }
    return "";
}

bool stream_graph::begin() {
    const int32_t *ids = static_cast<const int32_t *>(facts_.out_ids->data);
    const auto is_token = [&](int32_t id) { return id >= 0 && id < tokens_; };
    if (!std::is_sorted(ids, ids + n_outputs_) || !std::all_of(ids, ids + n_outputs_, is_token)) return false;
    input_memory_.clear();
    inputs_.assign(facts_.tensors.size(), nullptr);
    for (size_t i = static_cast<size_t>(facts_.n_nodes); i < facts_.tensors.size(); ++i) {
        const ggml_tensor *leaf = facts_.tensors[i];
        if (!is_input(leaf, facts_.tensors[0]->buffer) || !leaf->data) continue;
        const size_t bytes = host.ggml_nbytes(leaf);
        inputs_[i] = input_memory_.memory(bytes);
        std::memcpy(inputs_[i], leaf->data, bytes);
    }
    for (result &r : results_) r.rows.clear();
    return true;
}

/// Puts a stream's part of each section side by side; `first` is that of the first section.
char *stream_graph::join_sections(const char *first, const ggml_tensor *leaf, token_dim dim) {
    const size_t all = static_cast<size_t>(tokens_) * token_bytes(leaf, dim), own = all / static_cast<size_t>(streams_);
    char *joined = arena_.memory(own * static_cast<size_t>(dim.sections));
    for (size_t s = 0; s < static_cast<size_t>(dim.sections); ++s) std::memcpy(joined + s * own, first + s * all, own);
    return joined;
}

/// Gives a stream its part of each input.
void stream_graph::replace_inputs(int64_t stream) {
    const int64_t each = tokens_ / streams_;
    for (size_t i = static_cast<size_t>(facts_.n_nodes); i < facts_.tensors.size(); ++i) {
        if (!inputs_[i]) continue;
        const ggml_tensor *leaf = facts_.tensors[i];
        ggml_tensor *copy = arena_.copy(leaf);
        copy->data = inputs_[i];
        const token_dim dim = dims_[i];
        if (dim.by_stream) {
            copy->data = inputs_[i] + static_cast<size_t>(stream) * leaf->nb[3];
            copy->ne[3] = 1;
        } else if (dim) {
            copy->data = inputs_[i] + static_cast<size_t>(stream * each) * token_bytes(leaf, dim);
            copy->ne[dim.dim] = dim.mult * dim.sections * each;
            if (dim.sections > 1) copy->data = join_sections(static_cast<const char *>(copy->data), leaf, dim);
        } else if (leaf == facts_.out_ids) {
            const int32_t *ids = reinterpret_cast<const int32_t *>(inputs_[i]);
            int32_t *own = reinterpret_cast<int32_t *>(arena_.memory(sizeof(int32_t) * static_cast<size_t>(each) + 1));
            outputs_now_ = 0;
            for (int64_t o = 0; o < n_outputs_; ++o) {
                if (ids[o] / each == stream && outputs_now_ < each) {
                    own[outputs_now_++] = static_cast<int32_t>(ids[o] - stream * each);
                }
            }
            copy->data = own;
            copy->ne[0] = outputs_now_;
        }
        if (dim) make_contiguous(copy);
        now_[i] = copy;
    }
}

/// The node for a stream; the host's if all it reads is the host's.
ggml_tensor *stream_graph::make_node(int i, int64_t stream) {
    ggml_tensor *original = facts_.tensors[static_cast<size_t>(i)];
    const token_dim dim = dims_[static_cast<size_t>(i)], outputs = outputs_[static_cast<size_t>(i)];
    const bool has_streams = !dim && !outputs && original->ne[3] == streams_;
    bool touched = has_streams;
    ggml_tensor *sources[ggml_max_src] = {};
    for (int s = 0; s < ggml_max_src; ++s) {
        if (!original->src[s]) continue;
        sources[s] = now_[static_cast<size_t>(facts_.source(i, s))];
        touched = touched || sources[s] != original->src[s];
    }
    if (!touched) return original;
    ggml_tensor *copy = arena_.copy(original);
    std::copy_n(sources, ggml_max_src, copy->src);
    for (ggml_tensor *&src : copy->src) {
        if (src == original) src = copy;  // a conversion names itself as a source
    }
    if (dim) {
        shrink(copy, original, dim, tokens_, tokens_ / streams_);
    } else if (outputs) {
        shrink(copy, original, outputs, n_outputs_, outputs_now_);
    } else if (has_streams && root_of(original)->op == host.op_none) {
        // A view of the cache begins at the stream.
        const size_t offset = static_cast<size_t>(stream) * original->nb[3];
        copy->ne[3] = 1;
        copy->data = static_cast<char *>(original->data) + offset;
        copy->view_offs += offset;
    } else if (has_streams) {
        copy->ne[3] = 1;
        if (is_view_op(original)) copy->view_src = const_cast<ggml_tensor *>(root_of(copy->src[0]));
    }
    return copy;
}

std::vector<token_dim> stream_graph::dims() const {
    std::vector<token_dim> of_stream(dims_);
    for (token_dim &dim : of_stream) dim.by_stream = false;
    return of_stream;
}

std::vector<ggml_tensor *> &stream_graph::nodes(int64_t stream) {
    arena_.clear();
    now_ = facts_.tensors;
    replace_inputs(stream);
    nodes_.clear();
    for (int i = 0; i < facts_.n_nodes; ++i) {
        now_[static_cast<size_t>(i)] = make_node(i, stream);
        nodes_.push_back(now_[static_cast<size_t>(i)]);
    }
    return nodes_;
}

void stream_graph::keep_results() {
    for (result &r : results_) {
        const ggml_tensor *t = now_[static_cast<size_t>(r.number)];
        const char *data = static_cast<const char *>(t->data);
        r.rows.insert(r.rows.end(), data, data + static_cast<size_t>(outputs_now_) * t->nb[1]);
    }
}

void stream_graph::finish() const {
    for (const result &r : results_) {
        std::memcpy(facts_.tensors[static_cast<size_t>(r.number)]->data, r.rows.data(), r.rows.size());
    }
}

}  // namespace agq
