#include "prune/prune_plan.h"

#include <utility>

#include "graph/token_cut.h"
#include "scores/attention_weights.h"

namespace agq {

namespace {

bool plan_cut(const graph_facts &facts, const attention_kernel *kern, const prune_stage &stage, prune_plan *plan) {
    prune_cut cut;
    cut.stage = stage;
    plan->obstacle = find_site(facts, stage.layer, &cut.site);
    if (!plan->obstacle.empty()) return false;
    const attention_site &site = facts.sites[static_cast<size_t>(cut.site)];
    attention_job job;
    if (!plan_weights(site, kern, &job)) {
        plan->obstacle = "pruning does not support the attention of layer " + std::to_string(stage.layer);
        return false;
    }
    cut.at = site.last;
    const bool of_state = stage.measure->input == score_input::state;
    const int state = stage.reuse || of_state ? find_state(facts, plan->dims, cut.at) : -1;
    if (stage.measure->find_obstacle) {
        const ggml_tensor *state_tensor = state < 0 ? nullptr : facts.tensors[static_cast<size_t>(state)];
        plan->obstacle = stage.measure->find_obstacle({stage.layer, site, state_tensor, stage.direction});
        if (!plan->obstacle.empty()) return false;
    }
    if (of_state) cut.at = cut.state = state;
    plan->obstacle = find_crossing(facts, plan->dims, cut.at, &cut.crossing);
    if (!plan->obstacle.empty()) return false;
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
        plan.obstacle = "the host requests a tensor of all tokens";
    }
    return plan;
}

}  // namespace agq
