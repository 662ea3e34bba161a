// Finds patterns among the nodes of the host's graph. The nodes of a pattern must be consecutive; then its inputs still
// hold the values that they had at its first node.
#include "rewrite/fusion.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "graph/graph_facts.h"
#include "host/tensor_rows.h"

namespace agq {

namespace {

bool is_rows(const ggml_tensor *t) {
    return t && t->type == ggml_type_f32 && t->nb[0] == sizeof(float) && t->data;
}

bool same_shape(const ggml_tensor *a, const ggml_tensor *b) {
    return std::equal(a->ne, a->ne + 4, b->ne);
}

/// Whether `t` is one row, used for all rows of `like`.
bool is_single_row(const ggml_tensor *t, const ggml_tensor *like) {
    return is_rows(t) && t->ne[0] == like->ne[0] && t->ne[1] == 1 && t->ne[2] == 1 && t->ne[3] == 1;
}

/// Whether rows of `out` may be written while other rows of `in` are still to be read.
bool independent_rows(const ggml_tensor *out, const ggml_tensor *in) {
    const bool same = out->data == in->data && same_shape(out, in) && std::equal(out->nb, out->nb + 4, in->nb);
    return same || !shares_memory(out, in);
}

/// The nodes of a graph, and which nodes read which tensor.
class graph_view {
  public:
    graph_view(ggml_tensor **nodes, int n) : nodes_(nodes), n_(n) {
        for (int i = 0; i < n; ++i) {
            position_[nodes[i]] = i;
            for (const ggml_tensor *src : nodes[i]->src) {
                if (src) readers_[src].push_back(i);
            }
        }
    }

    int position(const ggml_tensor *t) const {
        const auto found = position_.find(t);
        return found == position_.end() ? -1 : found->second;
    }

    /// Nodes that read the tensor, ascending; a node that reads it twice is listed twice.
    const std::vector<int> &readers(const ggml_tensor *t) const {
        static const std::vector<int> none;
        const auto found = readers_.find(t);
        return found == readers_.end() ? none : found->second;
    }

    /// The node before node `i`, not counting empty operations; -1 if there is none.
    int before(int i) const {
        for (--i; i >= 0 && is_empty_op(nodes_[i]->op);) --i;
        return i;
    }

    /// Whether a node from `i` on overwrites the tensor's memory. Then no later node reads the tensor, here or in
    /// another part of the host's graph.
    bool is_over(const ggml_tensor *t, int i) const {
        for (; i < n_; ++i) {
            if (!is_empty_op(nodes_[i]->op) && root_of(nodes_[i]) != t && nodes_[i]->data &&
                shares_memory(nodes_[i], t))
                return true;
        }
        return false;
    }

    /// Whether node `reader` is the tensor's only reader.
    bool is_private(const ggml_tensor *t, int reader) const {
        const std::vector<int> &all = readers(t);
        return all.size() == 1 && all[0] == reader && is_over(t, reader);
    }

  private:
    ggml_tensor **nodes_;
    int n_;
    std::unordered_map<const ggml_tensor *, int> position_;
    std::unordered_map<const ggml_tensor *, std::vector<int>> readers_;
};

/// The operand of node `i` that the previous node computes for it alone, while the other operand is one row; null if
/// there is none.
const ggml_tensor *step_before(const graph_view &graph, const ggml_tensor *node, int i, const ggml_tensor **row) {
    for (int side = 0; side < 2; ++side) {
        const ggml_tensor *operand = node->src[side];
        *row = node->src[1 - side];
        if (operand && *row && is_rows(operand) && same_shape(operand, node) && is_single_row(*row, node) &&
            graph.position(operand) >= 0 && graph.position(operand) == graph.before(i) &&
            graph.is_private(operand, i)) {
            return operand;
        }
    }
    return nullptr;
}

/// Matches a norm with a weight, and perhaps a bias, that ends in node `last`.
bool match_norm(const graph_view &graph, const ggml_tensor *result, int last, fusion *found) {
    row_source &source = found->source;
    const ggml_tensor *scaled = result;
    int at = last;
    if (result->op == host.op_add) {
        scaled = step_before(graph, result, last, &source.bias);
        if (!scaled || scaled->op != host.op_mul) return false;
        at = graph.position(scaled);
    }
    if (scaled->op != host.op_mul) return false;
    const ggml_tensor *norm = step_before(graph, scaled, at, &source.weight);
    if (!norm || (norm->op != host.op_norm && norm->op != host.op_rms_norm)) return false;
    if (norm->op == host.op_rms_norm && source.bias) return false;
    source.what = norm->op == host.op_norm ? row_source::operation::layer_norm : row_source::operation::rms_norm;
    std::memcpy(&source.eps, norm->op_params, sizeof(source.eps));
    source.x = norm->src[0];
    found->replaced = {graph.position(norm), last};
    if (scaled != result) found->replaced.insert(found->replaced.begin() + 1, at);
    return is_rows(source.x) && same_shape(source.x, result);
}

/// Matches the residual addition before a norm. The host computes it if rows would overwrite each other.
void match_sum(const graph_view &graph, fusion *found) {
    row_source &source = found->source;
    const ggml_tensor *sum = source.x;
    const int at = graph.position(sum);
    if (at < 0 || sum->op != host.op_add || at != graph.before(found->replaced[0])) return;
    for (int i = 0; i < 2; ++i) {
        const ggml_tensor *addend = sum->src[i];
        if (!is_rows(addend) || !same_shape(addend, sum) || !independent_rows(sum, addend)) return;
        if (source.written && !independent_rows(source.result, addend)) return;
    }
    source.sum = sum;
    std::copy_n(sum->src, 2, source.addends);
    found->replaced.insert(found->replaced.begin(), at);
}

bool match_swiglu(const ggml_tensor *result, int last, fusion *found) {
    if (result->op != host.op_glu || result->op_params[0] != host.glu_swiglu) return false;
    row_source &source = found->source;
    source.what = row_source::operation::swiglu;
    source.x = result->src[0];
    source.up = result->src[1];
    source.swapped = result->op_params[1] != 0;
    found->replaced = {last};
    const int64_t width = result->ne[0];
    return is_rows(source.x) && source.x->ne[0] == (source.up ? width : 2 * width) &&
           std::equal(result->ne + 1, result->ne + 4, source.x->ne + 1) &&
           (!source.up || (is_rows(source.up) && same_shape(source.up, result) && !source.swapped));
}

}  // namespace

std::vector<fusion> find_fusions(ggml_tensor **nodes, int n, const std::vector<bool> &is_product,
                                 const std::function<bool(int, int)> &same_format) {
    std::vector<fusion> found;
    const graph_view graph(nodes, n);
    const auto next_product = [&](int i) {
        while (i < n && !is_product[static_cast<size_t>(i)]) ++i;
        return i;
    };
    for (int i = next_product(0); i < n; i = next_product(i + 1)) {
        const ggml_tensor *result = nodes[i]->src[1];
        const int last = graph.position(result);
        if (last < 0 || !is_rows(result) || next_product(last) != i) continue;
        fusion f;
        f.source.result = result;
        // Quantized activations are kept until a product with another input follows.
        const auto shares = [&](int j) {
            return j < n && nodes[j]->op == host.op_mul_mat && nodes[j]->src[1] == result && same_format(i, j);
        };
        for (int j = i; shares(j); j = next_product(j + 1)) f.products.push_back(j);
        if (f.products.empty()) continue;
        const int end = f.products.back();
        f.source.written = graph.readers(result) != f.products || !graph.is_over(result, end + 1);
        if (!match_swiglu(result, last, &f) && !match_norm(graph, result, last, &f)) continue;
        const auto in_the_way = [&](const ggml_tensor *in) { return in && !independent_rows(result, in); };
        if (f.source.written && (in_the_way(f.source.x) || in_the_way(f.source.up))) continue;
        if (f.source.what != row_source::operation::swiglu) match_sum(graph, &f);
        found.push_back(std::move(f));
    }
    return found;
}

}  // namespace agq
