#include "prune/kept_states.h"

#include <algorithm>
#include <set>

namespace agq {

namespace {

/// Walks back from the stores of one layer, or from a sum, through all token-indexed tensors.
class walk {
  public:
    walk(const graph_facts &facts, const std::vector<token_dim> &dims, int at) : facts_(facts), dims_(dims), at_(at) {}

    bool is_sum(int i) const {
        const ggml_tensor *t = facts_.tensors[static_cast<size_t>(i)];
        return i < facts_.n_nodes && t->op == host.op_add && depends(i) && depends(facts_.number(t->src[0])) &&
               depends(facts_.number(t->src[1]));
    }
    void sources_of(int i) {
        for (const ggml_tensor *src : facts_.tensors[static_cast<size_t>(i)]->src) {
            if (src) visit(facts_.number(src));
        }
    }
    std::set<int> nodes, boundary, sums;  ///< visited; before the cut, or inputs; where the walk ended after the cut

  private:
    bool depends(int i) const { return bool(dims_[static_cast<size_t>(i)]); }
    void visit(int i) {
        if (!depends(i)) return;
        if (i <= at_ || i >= facts_.n_nodes) {
            boundary.insert(i);
        } else if (is_sum(i)) {
            sums.insert(i);
        } else if (nodes.insert(i).second) {
            sources_of(i);
        }
    }

    const graph_facts &facts_;
    const std::vector<token_dim> &dims_;
    const int at_;
};

/// Stores of keys and values from node `begin` to node `end`.
std::vector<int> stores_between(const graph_facts &facts, int begin, int end) {
    std::vector<int> found;
    for (int i = begin; i < end; ++i) {
        if (facts.tensors[static_cast<size_t>(i)]->op == host.op_set_rows) found.push_back(i);
    }
    return found;
}

/// The reason for refusing a cut.
const char *const odd_layers = "states cannot be reused, because the structure of this model's layers is not supported";

}  // namespace

int find_state(const graph_facts &facts, const std::vector<token_dim> &dims, int at) {
    for (int i = at + 1; i < facts.n_nodes; ++i) {
        walk to_sum(facts, dims, at);
        if (!to_sum.is_sum(i)) continue;
        // One operand is the residual stream as it was before the attention. With a parallel feed-forward part it is
        // not.
        const ggml_tensor *sum = facts.tensors[static_cast<size_t>(i)];
        const auto is_before = [&](const ggml_tensor *t) { return facts.number(t) <= at; };
        if (is_before(sum->src[0]) == is_before(sum->src[1])) return -1;
        to_sum.sources_of(i);
        return to_sum.sums.empty() ? i : -1;
    }
    return -1;
}

std::string plan_states(const graph_facts &facts, const std::vector<token_dim> &dims, int site, int at, int state,
                        kept_states *plan) {
    *plan = {};
    if (state < 0) return odd_layers;
    std::set<int> gathered;
    plan->state = state;
    if (state > at) {
        walk to_sum(facts, dims, at);
        to_sum.sources_of(state);
        plan->leaving.assign(to_sum.nodes.begin(), to_sum.nodes.end());
        plan->leaving.push_back(state);
        gathered.insert(to_sum.boundary.begin(), to_sum.boundary.end());
    } else {
        gathered.insert(state);
    }
    for (size_t s = static_cast<size_t>(site) + 1; s < facts.sites.size(); ++s) {
        if (!facts.owns_cache(s)) continue;  // it stores nothing
        const std::vector<int> stores = stores_between(facts, facts.sites[s - 1].last + 1, facts.sites[s].first);
        walk to_stores(facts, dims, at);
        for (int store : stores) to_stores.sources_of(store);
        if (stores.size() != 2 || to_stores.sums.size() != 1) return odd_layers;
        kept_states::layer layer;
        layer.input = *to_stores.sums.begin();
        layer.nodes.assign(to_stores.nodes.begin(), to_stores.nodes.end());
        layer.nodes.insert(layer.nodes.end(), stores.begin(), stores.end());
        std::sort(layer.nodes.begin(), layer.nodes.end());
        gathered.insert(to_stores.boundary.begin(), to_stores.boundary.end());
        plan->layers.push_back(std::move(layer));
    }
    plan->gathered.assign(gathered.begin(), gathered.end());
    for (int i : plan->gathered) {
        if (!is_contiguous(facts.tensors[static_cast<size_t>(i)])) return odd_layers;
    }
    return "";
}

void copy_states(const kept_states &plan, const graph_copy &current, int64_t source_rows,
                 const std::vector<int32_t> &rows, graph_copy *aside, tensor_arena *arena, cut_job *job,
                 std::vector<ggml_tensor *> *nodes) {
    const int64_t n_gone = static_cast<int64_t>(rows.size());
    for (int number : plan.gathered) {
        ggml_tensor *to = aside->with_tokens(number, n_gone);
        job->gathers.push_back(aside->gather_of(number, current.current(number), to, source_rows, &rows));
        aside->replace(number, to);
    }
    const auto run = [&](int i, std::vector<std::pair<char *, size_t>> *memory, size_t *next) {
        ggml_tensor *copy = aside->aside(i, n_gone);
        const size_t bytes = host.ggml_nbytes(copy);
        if (!copy->data) {
            if (*next == memory->size()) memory->emplace_back(arena->memory(bytes), bytes);
            auto &[at, size] = (*memory)[*next];
            if (size < bytes) {
                at = arena->memory(bytes);
                size = bytes;
            }
            copy->data = at;
            ++*next;
        }
        nodes->push_back(copy);
    };
    std::vector<std::pair<char *, size_t>> first;
    size_t n_first = 0;
    for (int i : plan.leaving) run(i, &first, &n_first);
    ggml_tensor *state = aside->current(plan.state);
    std::vector<std::pair<char *, size_t>> scratch;  // layers run one after another, so they share it
    for (const kept_states::layer &layer : plan.layers) {
        size_t next = 0;
        aside->replace(layer.input, state);
        for (int i : layer.nodes) run(i, &scratch, &next);
    }
}

}  // namespace agq
