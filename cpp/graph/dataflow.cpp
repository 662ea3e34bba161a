#include "graph/dataflow.h"

#include <array>
#include <atomic>
#include <cstring>

namespace agq {

namespace {

/// Operations that share a rule.
enum class family : uint8_t {
    unresolved,
    unknown,
    elementwise,  ///< each element on its own
    rowwise,      ///< along dimension 0
    binary,       ///< the second operand may be broadcast
    gated,        ///< one or two operands
    lookup,
    store,
    product,
    expert_product,
    expert_bias,
    flash_attention,
    rope,
    soft_max,
    concat,
    repeat,
    permute,
    transpose,
    reshape,
    view,
};

/// Operation numbers differ between releases, so the family is found by name, once per number.
family family_of(int op) {
    static std::array<std::atomic<family>, 512> known{};
    if (op < 0 || op >= static_cast<int>(known.size())) return family::unknown;
    auto &entry = known[static_cast<size_t>(op)];
    if (const family f = entry.load(std::memory_order_relaxed); f != family::unresolved) return f;
    const struct {
        const char *name;
        family value;
    } table[] = {{"ADD", family::binary},
                 {"SUB", family::binary},
                 {"MUL", family::binary},
                 {"DIV", family::binary},
                 {"SCALE", family::elementwise},
                 {"UNARY", family::elementwise},
                 {"SQR", family::elementwise},
                 {"SQRT", family::elementwise},
                 {"LOG", family::elementwise},
                 {"SIN", family::elementwise},
                 {"COS", family::elementwise},
                 {"CLAMP", family::elementwise},
                 {"LEAKY_RELU", family::elementwise},
                 {"NORM", family::rowwise},
                 {"RMS_NORM", family::rowwise},
                 {"L2_NORM", family::rowwise},
                 {"PAD", family::rowwise},
                 {"SUM_ROWS", family::rowwise},
                 {"MEAN", family::rowwise},
                 {"ARGSORT", family::rowwise},
                 {"TOP_K", family::rowwise},
                 {"GLU", family::gated},
                 {"GET_ROWS", family::lookup},
                 {"SET_ROWS", family::store},
                 {"MUL_MAT", family::product},
                 {"MUL_MAT_ID", family::expert_product},
                 {"ADD_ID", family::expert_bias},
                 {"FLASH_ATTN_EXT", family::flash_attention},
                 {"ROPE", family::rope},
                 {"SOFT_MAX", family::soft_max},
                 {"CONCAT", family::concat},
                 {"REPEAT", family::repeat},
                 {"PERMUTE", family::permute},
                 {"TRANSPOSE", family::transpose},
                 {"RESHAPE", family::reshape},
                 {"CONT", family::reshape},
                 {"VIEW", family::view}};
    family found = family::unknown;
    for (const auto &row : table) {
        if (std::strcmp(row.name, host.ggml_op_name(op)) == 0) found = row.value;
    }
    entry.store(found, std::memory_order_relaxed);
    return found;
}

/// The input of a rule: a node and the token dimensions of its sources.
struct operands {
    const ggml_tensor *node;
    int64_t tokens, streams;
    token_dim src[ggml_max_src];

    /// A result whose dimension `dim` counts the tokens; none if its extent does not fit.
    token_dim result(int dim, int64_t mult, bool by_stream = false) const {
        if (by_stream && (dim == 3 || node->ne[3] != streams)) return {};
        const int64_t extent = mult * (by_stream ? tokens / streams : tokens);
        return dim >= 0 && dim < 4 && node->ne[dim] == extent ? token_dim{dim, mult, by_stream} : token_dim{};
    }
    /// A result with the token dimension of a source.
    token_dim like(token_dim a) const { return result(a.dim, a.mult, a.by_stream); }
    bool only_first() const {
        for (int i = 1; i < ggml_max_src; ++i) {
            if (src[i]) return false;
        }
        return bool(src[0]);
    }
};

token_dim trace_binary(const operands &x) {
    const token_dim a = x.src[0], b = x.src[1];
    if (!a || (b ? !(a == b) : x.node->src[1]->ne[a.dim] != 1)) return {};
    return x.like(a);
}

/// A reshape keeps row-major order, so the elements below the token dimension keep their total size. It joins streams.
token_dim trace_reshape(const operands &x) {
    if (!x.only_first() || (x.src[0].by_stream && x.src[0].dim != 2)) return {};
    int64_t per_token = x.src[0].mult, below = 1;
    for (int d = 0; d < x.src[0].dim; ++d) per_token *= x.node->src[0]->ne[d];
    for (int d = 0; d < 4 && below <= per_token; ++d) {
        if (per_token % below == 0 && x.node->ne[d] == per_token / below * x.tokens) return {d, per_token / below};
        below *= x.node->ne[d];
    }
    return {};
}

/// A view of all tokens: one dimension steps through the source's tokens from the first one; or two, if it divides them
/// into streams.
token_dim trace_view(const operands &x) {
    if (!x.only_first() || x.src[0].by_stream) return {};
    const ggml_tensor *node = x.node, *source = node->src[0];
    const size_t step = source->nb[x.src[0].dim] * static_cast<size_t>(x.src[0].mult);
    const size_t offset =
        static_cast<size_t>(static_cast<const char *>(node->data) - static_cast<const char *>(source->data));
    if (offset % (step * static_cast<size_t>(x.tokens)) >= step) return {};
    const int64_t each = x.tokens / x.streams;
    const bool divides = x.streams > 1 && node->ne[3] == x.streams && node->nb[3] == step * static_cast<size_t>(each);
    for (int d = divides ? 2 : 3; d >= 0; --d) {
        if (node->nb[d] == 0 || step % node->nb[d] != 0) continue;
        const int64_t mult = static_cast<int64_t>(step / node->nb[d]);
        if (node->ne[d] == mult * (divides ? each : x.tokens)) return {d, mult, divides};
    }
    return {};
}

token_dim trace_lookup(const operands &x) {
    const token_dim a = x.src[0], b = x.src[1];
    if (!a) return b.dim == 0 ? x.result(1, b.mult) : token_dim{};  // rows of a table, one per token
    if (a.dim == 2 && b.dim == 1 && a == token_dim{2, b.mult}) return x.result(2, a.mult);  // weights of the experts
    return {};
}

token_dim trace_product(const operands &x) {
    const token_dim a = x.src[0], b = x.src[1];
    if (a && a == b && a.dim >= 2 && !a.by_stream) return x.like(a);  // a matrix for each token
    if (a || b.dim < 1 || x.src[2] || (b.dim >= 2 && x.node->src[0]->ne[b.dim] != 1)) return {};
    return x.like(b);
}

token_dim trace_soft_max(const operands &x) {
    const token_dim a = x.src[0], mask = x.src[1];
    if (a.dim < 1 || x.src[2]) return {};
    if (x.node->src[1] && !(mask == token_dim{1, 1, a.by_stream} && a == mask)) return {};
    return x.like(a);
}

/// The token dimension of a node with a token-indexed source; none if the operation is not supported.
token_dim trace_node(const operands &x) {
    const token_dim a = x.src[0], b = x.src[1];
    switch (family_of(x.node->op)) {
        case family::elementwise:
            return x.only_first() ? x.like(a) : token_dim{};
        case family::rowwise:
            return x.only_first() && a.dim >= 1 ? x.like(a) : token_dim{};
        case family::binary:
            return trace_binary(x);
        case family::gated:
            return a.dim >= 1 && (!x.node->src[1] || a == b) ? x.like(a) : token_dim{};
        case family::lookup:
            return trace_lookup(x);
        case family::product:
            return trace_product(x);
        case family::expert_product:
            return !a && b == token_dim{2, 1} && x.src[2] == token_dim{1, 1} ? x.result(2, 1) : token_dim{};
        case family::expert_bias:
            return a == token_dim{2, 1} && !b && x.src[2] == token_dim{1, 1} ? x.result(2, 1) : token_dim{};
        case family::flash_attention:
            return a.dim == 1 && a.mult == 1 && !b && !x.src[2] && x.src[3] == a && !x.src[4]
                       ? x.result(2, 1, a.by_stream)
                       : token_dim{};
        case family::rope: {
            const bool has_positions = b == token_dim{0, 1} || b == token_dim{0, 1, false, position_sections};
            return a == token_dim{2, 1} && has_positions && !x.src[2] ? x.result(2, 1) : token_dim{};
        }
        case family::soft_max:
            return trace_soft_max(x);
        case family::concat:
            return a && a == b && x.node->op_params[0] != a.dim ? x.like(a) : token_dim{};
        case family::repeat:
            return x.only_first() ? x.like(a) : token_dim{};
        case family::permute:
            if (a.by_stream && x.node->op_params[3] != 3) return {};
            return x.only_first() ? x.result(x.node->op_params[a.dim], a.mult, a.by_stream) : token_dim{};
        case family::transpose:
            return x.only_first() ? x.result(a.dim < 2 ? 1 - a.dim : a.dim, a.mult, a.by_stream) : token_dim{};
        case family::reshape:
            return trace_reshape(x);
        case family::view:
            return trace_view(x);
        case family::store:
        case family::unknown:
        case family::unresolved:
            break;
    }
    return {};
}

/// Inputs are recognized by name. Returns false for an unknown one.
bool trace_input(const graph_facts &facts, const ggml_tensor *leaf, int64_t tokens, token_dim *dim,
                 std::string *reason) {
    *dim = {};
    const std::string_view name = facts.input_name(leaf);
    int wanted = -1;
    if (name == "inp_tokens" || name == "inp_layer_tokens" || name == "inp_pos" || name == "attn_inp_k_idxs") {
        wanted = 0;
    }
    if (name == "inp_embd" || name == "attn_inp_kq_mask") wanted = 1;
    if (name == "inp_attn_scale" || name == "attn_scale") wanted = 2;
    const int64_t streams = facts.mask ? facts.mask->ne[3] : 1;
    if (name == "attn_inp_kq_mask" && streams > 1 && leaf->ne[3] == streams && leaf->ne[1] * streams == tokens) {
        *dim = {1, 1, true};
        return true;
    }
    if (name == "inp_pos" && leaf->ne[0] == position_sections * tokens) {
        *dim = {0, 1, false, position_sections};
        return true;
    }
    if (wanted >= 0) {
        *dim = {wanted, 1};
        if (leaf->ne[wanted] == tokens) return true;
        if (name != "inp_pos") *reason = "the ubatch holds several streams of sequences";
        return false;
    }
    if (name == "attn_inp_v_idxs") {
        *dim = {0, leaf->ne[0] / tokens};
        return leaf->ne[0] % tokens == 0;
    }
    const bool harmless = name == "out_ids" || name == "attn_inp_k_rot" || name == "attn_inp_v_rot";
    if (!(leaf->flags & ggml_flag_input) || harmless) return true;
    *reason = name == "embd" ? "the ubatch holds embeddings instead of tokens, as those of an image"
                             : "pruning does not support the graph's input '" + std::string(name) + "'";
    return false;
}

/// Nodes with token-indexed sources but no token-indexed result: K/V stores, and the selection of tokens whose logits
/// are wanted.
bool is_exit(const operands &x, const graph_facts &facts) {
    const token_dim a = x.src[0], b = x.src[1];
    if (family_of(x.node->op) == family::store) {
        return a.dim == 1 && b == token_dim{0, a.mult} && root_of(x.node)->op == host.op_none;
    }
    return family_of(x.node->op) == family::lookup && a == token_dim{1, 1} && x.node->src[1] == facts.out_ids;
}

}  // namespace

bool is_view_op(const ggml_tensor *node) {
    if (std::strcmp(host.ggml_op_name(node->op), "CONT") == 0) return false;
    const family f = family_of(node->op);
    return f == family::permute || f == family::transpose || f == family::reshape || f == family::view;
}

namespace {

/// Follows the tensors in `dims`, which are leaves or exits, through all nodes that read them.
bool trace(const graph_facts &facts, int64_t tokens, int64_t streams, bool ends_at_exits, std::vector<token_dim> *dims,
           std::string *reason) {
    for (size_t i = 0; i < static_cast<size_t>(facts.n_nodes); ++i) {
        operands x{facts.tensors[i], tokens, streams, {}};
        bool any = false;
        for (int s = 0; s < ggml_max_src; ++s) {
            if (!x.node->src[s]) continue;
            x.src[s] = (*dims)[static_cast<size_t>(facts.source(static_cast<int>(i), s))];
            any = any || x.src[s];
        }
        if (!any || (ends_at_exits && is_exit(x, facts))) continue;
        (*dims)[i] = trace_node(x);
        if (!(*dims)[i]) {
            *reason = std::string("pruning does not support the operation ") + host.ggml_op_name(x.node->op) + " ('" +
                      std::string(name_of(x.node)) + "')";
            return false;
        }
    }
    return true;
}

}  // namespace

bool trace_tokens(const graph_facts &facts, int64_t tokens, std::vector<token_dim> *dims, std::string *reason) {
    const size_t n = static_cast<size_t>(facts.n_nodes);
    dims->assign(facts.tensors.size(), {});
    for (size_t i = n; i < facts.tensors.size(); ++i) {
        if (!trace_input(facts, facts.tensors[i], tokens, &(*dims)[i], reason)) {
            if (reason->empty()) *reason = "an input has an unexpected shape";
            return false;
        }
    }
    const int64_t streams = facts.mask ? facts.mask->ne[3] : 1;
    return trace(facts, tokens, streams, true, dims, reason);
}

bool trace_outputs(const graph_facts &facts, int64_t outputs, std::vector<token_dim> *dims, std::string *reason) {
    dims->assign(facts.tensors.size(), {});
    for (size_t i = 0; i < static_cast<size_t>(facts.n_nodes); ++i) {
        const ggml_tensor *node = facts.tensors[i];
        if (node->op == host.op_get_rows && node->src[1] == facts.out_ids) (*dims)[i] = {1, 1};
    }
    return trace(facts, outputs, 1, false, dims, reason);
}

}  // namespace agq
