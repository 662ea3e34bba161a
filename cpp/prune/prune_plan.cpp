#include "prune/prune_plan.h"

#include <algorithm>

#include "prune/graph_copy.h"
#include "scores/attention_score.h"

namespace agq {

namespace {

/// What is missing or odd at first sight.
std::string find_gap(const graph_facts &facts) {
    // Whole graphs choose the tokens whose logits are wanted; the first of several parts has no sources from outside.
    if (!facts.complete || (facts.k_cells && !facts.out_ids)) {
        return "the host computes the graph in parts (an evaluation callback, or several devices)";
    }
    if (facts.ambiguous) return "the model has several attention masks or caches (sliding windows)";
    if (!facts.mask || !facts.k_cells || facts.sites.empty()) return "the model has no causal K/V cache";
    if (facts.mask->ne[3] != 1) return "the batch holds several sequences";
    for (size_t i = 0; i < facts.sites.size(); ++i) {
        if (facts.sites[i].last < 0) return "the output of an attention was not found";
        if (i > 0 && facts.sites[i].layer <= facts.sites[i - 1].layer) return "layers share their K/V cache";
    }
    return "";
}

/// Whether a host could look at a tensor of which the pruned run only computes some tokens.
bool is_wanted_whole(const graph_facts &facts, const std::vector<token_dim> &dims, int first_cut) {
    const size_t n = static_cast<size_t>(facts.n_nodes);
    if (dims[n - 1]) return true;
    for (size_t i = static_cast<size_t>(first_cut); i < n; ++i) {
        if (dims[i] && (facts.tensors[i]->flags & ggml_flag_output)) return true;
    }
    return false;
}

/// Why a learned score cannot be computed, empty if it can.
std::string learned_obstacle(const graph_facts &facts, const prune_stage &stage, int state) {
    const std::string layer = "layer " + std::to_string(stage.layer);
    if (!stage.direction) return "the file has no learned score for " + layer;
    if (state < 0)
        return "a learned score needs layers whose attention and feed-forward part stand one behind the other";
    const ggml_tensor *t = facts.tensors[static_cast<size_t>(state)];
    if (t->type != ggml_type_f32 || t->ne[0] != static_cast<int64_t>(stage.direction->size()) || !is_contiguous(t)) {
        return "the learned score of " + layer + " is for states of " + std::to_string(stage.direction->size()) +
               " channels, the model has " + std::to_string(t->ne[0]);
    }
    return "";
}

bool plan_cut(const graph_facts &facts, const attention_kernel *kern, const prune_stage &stage, prune_plan *plan) {
    const auto site = std::find_if(facts.sites.begin(), facts.sites.end(),
                                   [&](const attention_site &s) { return s.layer == stage.layer; });
    if (site == facts.sites.end() || site + 1 == facts.sites.end()) {
        plan->obstacle = "layer " + std::to_string(stage.layer) + " is not one that others follow (the last is " +
                         std::to_string(facts.sites.back().layer) + ")";
        return false;
    }
    attention_job job;
    if (!plan_importance(*site, facts.mask, kern, &job)) {
        plan->obstacle = "the attention of layer " + std::to_string(stage.layer) + " is of a kind that is not covered";
        return false;
    }
    prune_cut cut;
    cut.stage = stage;
    cut.site = static_cast<int>(site - facts.sites.begin());
    cut.at = site->last;
    int state = -1;
    const bool is_learned = stage.score == prune_score::learned;
    if (stage.reuse || is_learned) state = find_state(facts, plan->dims, cut.at);
    if (is_learned) {
        plan->obstacle = learned_obstacle(facts, stage, state);
        if (!plan->obstacle.empty()) return false;
        cut.at = cut.state = state;
    }
    for (size_t i = 0; i < facts.tensors.size(); ++i) {
        const bool before = static_cast<int>(i) <= cut.at || static_cast<int>(i) >= facts.n_nodes;
        if (!before || !plan->dims[i] || facts.last_use[i] <= cut.at || facts.tensors[i] == facts.mask) continue;
        if (!is_contiguous(facts.tensors[i])) {
            plan->obstacle = "the tensor '" + name_of(facts.tensors[i]) + "' is not contiguous";
            return false;
        }
        cut.crossing.push_back(static_cast<int>(i));
    }
    if (stage.reuse) {
        plan->obstacle = plan_states(facts, plan->dims, cut.site, cut.at, state, &cut.states);
        if (!plan->obstacle.empty()) return false;
    }
    plan->cuts.push_back(std::move(cut));
    return true;
}

}  // namespace

prune_plan plan_pruning(const graph_facts &facts, const std::vector<prune_stage> &stages,
                        const attention_kernel *kern) {
    prune_plan plan;
    plan.obstacle = find_gap(facts);
    if (!plan.obstacle.empty()) return plan;
    if (!kern) {
        plan.obstacle = "this build has no attention kernels";
        return plan;
    }
    plan.tokens = facts.k_cells->ne[0];
    if (!trace_tokens(facts, plan.tokens, &plan.dims, &plan.obstacle)) return plan;
    for (const prune_stage &stage : stages) {
        if (!plan_cut(facts, kern, stage, &plan)) return plan;
    }
    if (!plan.cuts.empty() && is_wanted_whole(facts, plan.dims, plan.cuts[0].at)) {
        plan.obstacle = "the host wants a tensor of all tokens";
    }
    return plan;
}

}  // namespace agq
