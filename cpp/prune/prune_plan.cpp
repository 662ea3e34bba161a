#include "prune/prune_plan.h"

#include <algorithm>
#include <utility>

#include "graph/token_cut.h"
#include "scores/attention_weights.h"

namespace agq {

namespace {

/// Adds a head to those that are measured, if it is not among them.
void add_probe(int site, int head, std::vector<head_site> *probes) {
    const auto at = std::lower_bound(probes->begin(), probes->end(), site,
                                     [](const head_site &probe, int wanted) { return probe.site < wanted; });
    const auto found = at != probes->end() && at->site == site ? at : probes->insert(at, {site, {}});
    const auto place = std::lower_bound(found->heads.begin(), found->heads.end(), head);
    if (place == found->heads.end() || *place != head) found->heads.insert(place, head);
}

/// Finds the attentions of the heads that a cut looks at. Returns the obstacle, or empty.
std::string plan_heads(const graph_facts &facts, const attention_kernel *kern, prune_cut *cut,
                       std::vector<head_site> *probes) {
    const int layer = cut->stage.layer;
    const head_choice &choice = cut->stage.heads;
    if (choice.empty()) return "neither the file nor AGQ_PRUNE names heads for layer " + std::to_string(layer);
    if (choice.tail != head_choice::no_overlap && !facts.tokens) return "the prompt has no tokens, only embeddings";
    cut->heads = choice.heads;
    if (choice.all) {
        const int64_t n = facts.sites[static_cast<size_t>(cut->site)].q->ne[2];
        for (int head = 0; head < n; ++head) cut->heads.push_back({layer, head});
    }
    for (const attention_head &wanted : cut->heads) {
        int index = 0;
        if (wanted.layer > layer) return "a head of layer " + std::to_string(wanted.layer) + " comes after the cut";
        std::string obstacle = find_site(facts, wanted.layer, &index);
        if (!obstacle.empty()) return obstacle;
        const attention_site &site = facts.sites[static_cast<size_t>(index)];
        attention_job job;
        if (!plan_weights(site, kern, &job)) {
            return "pruning does not support the attention of layer " + std::to_string(wanted.layer);
        }
        if (wanted.head >= site.q->ne[2]) {
            return "layer " + std::to_string(wanted.layer) + " has " + std::to_string(site.q->ne[2]) +
                   " heads, so there is no head " + std::to_string(wanted.head);
        }
        add_probe(index, wanted.head, probes);
    }
    return "";
}

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
    if (stage.measure->input == score_input::heads) {
        plan->obstacle = plan_heads(facts, kern, &cut, &plan->probes);
        if (!plan->obstacle.empty()) return false;
    }
    cut.at = site.last;
    const bool of_state = stage.measure->input == score_input::state;
    const int state = stage.reuse || of_state ? find_state(facts, plan->dims, cut.at) : -1;
    if (stage.measure->find_obstacle) {
        const ggml_tensor *state_tensor = state < 0 ? nullptr : facts.tensors[static_cast<size_t>(state)];
        plan->obstacle = stage.measure->find_obstacle({stage.layer, site, {}, state_tensor, stage.direction});
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

size_t cuts_before_cache(const prune_plan &plan, const attention_site &site) {
    const auto is_before = [&site](const prune_cut &cut) { return cut.site < site.owner; };
    return static_cast<size_t>(std::count_if(plan.cuts.begin(), plan.cuts.end(), is_before));
}

prune_plan plan_pruning(const graph_facts &facts, const std::vector<prune_stage> &stages, const attention_kernel *kern,
                        const std::vector<token_dim> &dims) {
    prune_plan plan;
    plan.obstacle = find_gap(facts);
    if (!plan.obstacle.empty()) return plan;
    if (!kern) {
        plan.obstacle = "this build has no attention kernels";
        return plan;
    }
    plan.tokens = facts.n_tokens();
    plan.dims = dims;
    if (dims.empty() && !trace_tokens(facts, plan.tokens, &plan.dims, &plan.obstacle)) return plan;
    if (plan.dims.size() != facts.tensors.size()) {
        plan.obstacle = "the graph of a single sequence differs from that of several";
        return plan;
    }
    for (const prune_stage &stage : stages) {
        if (!plan_cut(facts, kern, stage, &plan)) return plan;
    }
    plan.last_states = find_last_states(facts, plan.dims);
    if (!plan.cuts.empty() && is_wanted_whole(facts, plan.dims, plan.cuts[0].at)) {
        plan.obstacle = "the host requests a tensor of all tokens";
    }
    return plan;
}

}  // namespace agq
