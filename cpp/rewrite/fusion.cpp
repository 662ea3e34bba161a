// Finds patterns among the nodes of the host's graph. The nodes of a pattern must be consecutive; then its inputs still
// hold the values that they had at its first node.
#include "rewrite/fusion.h"

#include <algorithm>
#include <cstring>

#include "rewrite/graph_view.h"

namespace agq {

namespace {

/// Whether `t` is one row, used for all rows of `like`.
bool is_single_row(const ggml_tensor *t, const ggml_tensor *like) {
    return is_rows(t) && t->ne[0] == like->ne[0] && t->ne[1] == 1 && t->ne[2] == 1 && t->ne[3] == 1;
}

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

/// Matches the bias of an expert that is added to `input` of the gated unit, node `last`.
void match_expert_bias(const graph_view &graph, const ggml_tensor *input, int last, const ggml_tensor *ids,
                       row_source::expert_bias *bias, std::vector<int> *replaced) {
    const int at = input ? graph.position(input) : -1;
    if (at < 0 || input->op != host.op_add_id || input->src[2] != ids || graph.readers(input).size() != 1) return;
    const ggml_tensor *x = input->src[0], *b = input->src[1];
    if (!is_rows(x) || !is_rows(b) || !same_shape(x, input) || ids->ne[0] != x->ne[1] || ids->ne[1] != x->ne[2]) return;
    if (!independent_rows(input, x) || !graph.is_unchanged(x, at, last)) return;
    *bias = {x, b, ids};
    replaced->insert(replaced->begin(), at);
}

/// Matches a gated unit. `ids`: the experts of its rows, or null.
bool match_swiglu(const graph_view &graph, const ggml_tensor *result, int last, const ggml_tensor *ids, fusion *found) {
    if (result->op != host.op_glu) return false;
    row_source &source = found->source;
    const int unit = result->op_params[0];
    if (unit != host.glu_swiglu && unit != host.glu_swiglu_oai) return false;
    source.what = unit == host.glu_swiglu ? row_source::operation::swiglu : row_source::operation::swiglu_oai;
    std::memcpy(&source.alpha, result->op_params + 2, sizeof(source.alpha));
    std::memcpy(&source.limit, result->op_params + 3, sizeof(source.limit));
    source.x = result->src[0];
    source.up = result->src[1];
    source.swapped = result->op_params[1] != 0;
    found->replaced = {last};
    const int64_t width = result->ne[0];
    if (!is_rows(source.x) || source.x->ne[0] != (source.up ? width : 2 * width) ||
        !std::equal(result->ne + 1, result->ne + 4, source.x->ne + 1) ||
        (source.up && (!is_rows(source.up) || !same_shape(source.up, result) || source.swapped))) {
        return false;
    }
    if (ids && source.up) {
        match_expert_bias(graph, source.x, last, ids, &source.gate_bias, &found->replaced);
        match_expert_bias(graph, source.up, last, ids, &source.up_bias, &found->replaced);
        std::sort(found->replaced.begin(), found->replaced.end());
    }
    return true;
}

const ggml_tensor *experts_of(const ggml_tensor *product) {
    return product->op == host.op_mul_mat_id ? product->src[2] : nullptr;
}

/// The rows that a product with experts reads if all experts of a token read the same row; else null.
const ggml_tensor *shared_rows(const ggml_tensor *input) {
    const ggml_tensor *rows = input->op == host.op_reshape ? input->src[0] : nullptr;
    return rows && rows->data == input->data && input->ne[1] == 1 && rows->ne[0] == input->ne[0] &&
                   rows->ne[1] == input->ne[2] && rows->ne[2] == 1 && rows->ne[3] == 1
               ? rows
               : nullptr;
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
        const ggml_tensor *input = nodes[i]->src[1], *ids = experts_of(nodes[i]);
        const ggml_tensor *shared = ids ? shared_rows(input) : nullptr;
        const ggml_tensor *result = shared ? shared : input;
        const int last = graph.position(result);
        if (last < 0 || !is_rows(result) || next_product(last) != i) continue;
        if (ids && !shared && (result->ne[1] != ids->ne[0] || result->ne[2] != ids->ne[1])) continue;
        fusion f;
        f.source.result = result;
        // Quantized activations are kept until a product with another input follows.
        const auto shares = [&](int j) {
            return j < n && nodes[j]->op == nodes[i]->op && nodes[j]->src[1] == input && experts_of(nodes[j]) == ids &&
                   same_format(i, j);
        };
        for (int j = i; shares(j); j = next_product(j + 1)) f.products.push_back(j);
        if (f.products.empty()) continue;
        const int end = f.products.back();
        f.source.written = shared || graph.readers(result) != f.products || !graph.is_over(result, end + 1);
        if ((shared || !match_swiglu(graph, result, last, ids, &f)) && !match_norm(graph, result, last, &f)) continue;
        const auto in_the_way = [&](const ggml_tensor *in) { return in && !independent_rows(result, in); };
        if (f.source.written && (in_the_way(f.source.x) || in_the_way(f.source.up) ||
                                 in_the_way(f.source.gate_bias.x) || in_the_way(f.source.up_bias.x))) {
            continue;
        }
        if (f.source.weight) match_sum(graph, &f);
        found.push_back(std::move(f));
    }
    return found;
}

}  // namespace agq
