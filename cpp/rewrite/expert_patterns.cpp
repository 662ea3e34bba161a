// The nodes of a pattern must be consecutive, and nobody else may need what is left out of memory.
#include "rewrite/expert_patterns.h"

#include <algorithm>

#include "rewrite/graph_view.h"

namespace agq {

namespace {

/// Whether `t` holds one binary32 number for each row of `rows`.
bool is_number_per_row(const ggml_tensor *t, const ggml_tensor *rows) {
    return is_rows(t) && t->ne[0] == 1 && std::equal(t->ne + 1, t->ne + 4, rows->ne + 1);
}

/// Whether `view` shows expert `i` of all tokens.
bool shows_expert(const ggml_tensor *view, const ggml_tensor *outputs, int64_t i) {
    return view->op == host.op_view && view->src[0] == outputs && view->ne[0] == outputs->ne[0] &&
           view->ne[1] == outputs->ne[2] && view->ne[2] == 1 && view->ne[3] == 1 && view->nb[0] == outputs->nb[0] &&
           (view->ne[1] == 1 || view->nb[1] == outputs->nb[2]) &&
           view->data == static_cast<const char *>(outputs->data) + i * static_cast<int64_t>(outputs->nb[1]);
}

/// The nodes that add the views of `weighted`, in order; empty if they do not.
std::vector<int> match_additions(const graph_view &graph, ggml_tensor **nodes, const ggml_tensor *weighted) {
    std::vector<int> found;
    const std::vector<int> &views = graph.readers(weighted);
    const int64_t n = weighted->ne[1];
    if (n < 2 || n > expert_sum::most || static_cast<int64_t>(views.size()) != n) return found;
    const ggml_tensor *sum = nullptr;
    int at = graph.position(weighted);
    for (int64_t i = 0; i < n; ++i) {
        const ggml_tensor *view = nodes[views[static_cast<size_t>(i)]];
        const std::vector<int> &readers = graph.readers(view);
        if (!shows_expert(view, weighted, i) || (view->flags & ggml_flag_output) || readers.size() != 1) return {};
        if (i == 0) {
            sum = view;
            continue;
        }
        const ggml_tensor *next = nodes[readers[0]];
        if (next->op != host.op_add || next->src[0] != sum || next->src[1] != view || !is_rows(next) ||
            graph.before(readers[0]) != at || (i > 1 && !graph.is_private(sum, readers[0]))) {
            return {};
        }
        sum = next;
        at = readers[0];
        found.push_back(at);
    }
    return found;
}

}  // namespace

std::vector<expert_sum_match> find_expert_sums(ggml_tensor **nodes, int n) {
    std::vector<expert_sum_match> found;
    const graph_view graph(nodes, n);
    for (int i = 0; i < n; ++i) {
        const ggml_tensor *weighted = nodes[i];
        if (weighted->op != host.op_mul || !is_rows(weighted) || !is_rows(weighted->src[0]) || weighted->ne[3] != 1 ||
            !same_shape(weighted, weighted->src[0]) || !is_number_per_row(weighted->src[1], weighted)) {
            continue;
        }
        const std::vector<int> additions = match_additions(graph, nodes, weighted);
        if (additions.empty()) continue;
        const int last = additions.back();
        const bool needed = (weighted->flags & ggml_flag_output) || !graph.is_over(weighted, last);
        expert_sum_match match = {{weighted->src[0], nullptr, nullptr, weighted->src[1], needed ? weighted : nullptr},
                                  {i}};
        const ggml_tensor *biased = weighted->src[0];
        const int at = graph.position(biased);
        if (at >= 0 && biased->op == host.op_add_id && at == graph.before(i) && graph.is_private(biased, i) &&
            is_rows(biased->src[0]) && is_rows(biased->src[1]) && biased->src[2]->type == ggml_type_i32) {
            match.outputs = biased->src[0];
            match.bias = biased->src[1];
            match.ids = biased->src[2];
            match.replaced.insert(match.replaced.begin(), at);
        }
        match.replaced.insert(match.replaced.end(), additions.begin(), additions.end());
        const auto in_the_way = [&](const ggml_tensor *in) { return in && shares_memory(in, nodes[last]); };
        if (in_the_way(match.outputs) || in_the_way(match.weights) || in_the_way(match.ids)) continue;
        // The terms are written by column; the bias may be added where the sum was read before.
        if (needed && (shares_memory(weighted, nodes[last]) || !independent_rows(weighted, match.outputs))) continue;
        found.push_back(std::move(match));
    }
    return found;
}

namespace {

/// The node's only reader if that has the operation; else null.
const ggml_tensor *only_reader(const graph_view &graph, ggml_tensor **nodes, const ggml_tensor *t, int op) {
    const std::vector<int> &readers = graph.readers(t);
    return readers.size() == 1 && nodes[readers[0]]->op == op ? nodes[readers[0]] : nullptr;
}

/// Whether the tensor holds the same numbers as `t`, row by row of `n` numbers.
bool shows_rows(const ggml_tensor *t, const ggml_tensor *whole, int64_t n) {
    return t->op == host.op_reshape && is_rows(t) && t->data == whole->data && t->ne[0] == n &&
           t->ne[1] == whole->ne[2] && t->ne[2] == 1 && t->ne[3] == 1 && is_contiguous(t) && is_contiguous(whole);
}

/// Matches the division of the weights by their sum.
void match_shares(const graph_view &graph, ggml_tensor **nodes, expert_choice_match *match) {
    const ggml_tensor *rows = only_reader(graph, nodes, match->weights, host.op_reshape);
    if (!rows || !shows_rows(rows, match->weights, match->ids->ne[0]) || graph.readers(rows).size() != 2) return;
    const int last = match->replaced.back(), at = graph.readers(rows)[0], end = graph.readers(rows)[1];
    const ggml_tensor *sum = nodes[at], *shares = nodes[end];
    if (sum->op != host.op_sum_rows || graph.before(at) != last || !is_rows(sum)) return;
    const ggml_tensor *clamped = only_reader(graph, nodes, sum, host.op_clamp);
    if (!clamped || !is_rows(clamped) || graph.before(graph.position(clamped)) != at) return;
    if (shares->op != host.op_div || !is_rows(shares) || shares->src[0] != rows || shares->src[1] != clamped ||
        graph.before(end) != graph.position(clamped) || graph.readers(clamped).size() != 1 ||
        !same_shape(shares, rows)) {
        return;
    }
    match->sum = sum;
    match->clamped = clamped;
    match->shares = shares;
    match->replaced.insert(match->replaced.end(), {at, graph.position(clamped), end});
}

/// Whether one token's results may be written before another token's inputs are read.
bool tokens_are_independent(const expert_choice_match &m) {
    const ggml_tensor *const results[] = {m.sorted, m.weights, m.sum, m.clamped, m.shares};
    for (const ggml_tensor *result : results) {
        if (result && (shares_memory(result, m.scores) || shares_memory(result, m.values))) return false;
    }
    return true;
}

}  // namespace

std::vector<expert_choice_match> find_expert_choices(ggml_tensor **nodes, int n) {
    constexpr int descending = 1;
    std::vector<expert_choice_match> found;
    const graph_view graph(nodes, n);
    for (int i = 0; i < n; ++i) {
        const ggml_tensor *sorted = nodes[i], *scores = sorted->src[0];
        if (sorted->op != host.op_argsort || sorted->op_params[0] != descending || !is_rows(scores) ||
            sorted->ne[2] != 1 || sorted->ne[3] != 1 || (sorted->flags & ggml_flag_output)) {
            continue;
        }
        const ggml_tensor *ids = only_reader(graph, nodes, sorted, host.op_view);
        if (!ids || ids->data != sorted->data || ids->ne[0] > expert_choice::most || ids->ne[1] != sorted->ne[1] ||
            ids->ne[2] != 1 || ids->ne[3] != 1 || ids->nb[1] != sorted->nb[1] || graph.readers(ids).empty()) {
            continue;
        }
        const int at = graph.readers(ids)[0];
        const ggml_tensor *weights = nodes[at], *values = weights->src[0];
        if (weights->op != host.op_get_rows || weights->src[1] != ids || graph.before(at) != i || !is_rows(weights) ||
            !is_rows(values) || values->ne[0] != 1 || values->ne[1] != scores->ne[0] ||
            values->ne[2] != scores->ne[1] || values->ne[3] != 1) {
            continue;
        }
        expert_choice_match match = {{scores, sorted, ids, values, weights, nullptr, nullptr, nullptr}, {i, at}};
        match_shares(graph, nodes, &match);
        if (scores->ne[1] > 1 && !tokens_are_independent(match)) continue;
        found.push_back(std::move(match));
    }
    return found;
}

}  // namespace agq
