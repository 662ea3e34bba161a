#include "prune/planned_graph.h"

#include <algorithm>

#include "format/attributes.h"

namespace agq {

namespace {

/// Reads the pruning record of a layer's weight. Returns false if there is none. Damaged attributes are reported by the
/// products that use them.
bool read_record(const ggml_tensor *weights, prune_stage *stage) {
    if (block_of(weights) < 0 || !weights->data || weights->view_src || !is_shape(weights->ne[1], weights->ne[0])) {
        return false;
    }
    const tile *tiles = static_cast<const tile *>(weights->data);
    if (!(read_header(tiles, weights->ne[1], weights->ne[0]).flags & flag_pruning)) return false;
    std::string ignored;
    const auto attributes = parse_attributes(tiles, weights->ne[1], weights->ne[0], &ignored);
    if (!attributes || !attributes->prunes) return false;
    stage->layer = block_of(weights);
    stage->rule.value = attributes->prune_threshold;
    stage->measure = find_score(attributes->prune_score);
    if (!stage->measure) return false;
    stage->heads = attributes->prune_heads;
    stage->keep = attributes->prune_keep;
    stage->reach = attributes->prune_reach;
    stage->reuse = attributes->prune_reuse;
    if (!attributes->prune_direction.empty()) {
        stage->direction = std::make_shared<const std::vector<float>>(attributes->prune_direction);
    }
    return true;
}

}  // namespace

std::vector<prune_stage> planned_graph::stages() const {
    if (settings_.source == prune_settings::source_kind::off) return {};
    const bool is_list = settings_.source == prune_settings::source_kind::list;
    const auto is_incomplete = [](const prune_stage &s) {
        return (s.measure->needs_direction && !s.direction) ||
               (s.measure->input == score_input::heads && s.heads.empty());
    };
    const bool needs_file = std::any_of(settings_.stages.begin(), settings_.stages.end(), is_incomplete);
    if (is_list && !needs_file) return settings_.stages;
    const std::vector<prune_stage> &found = recorded();
    if (!is_list) return found;
    std::vector<prune_stage> wanted = settings_.stages;
    for (prune_stage &stage : wanted) {
        for (const prune_stage &record : found) {
            if (record.layer != stage.layer) continue;
            if (!stage.direction) stage.direction = record.direction;
            if (stage.heads.empty()) stage.heads = record.heads;
        }
    }
    return wanted;
}

/// The stages that the file's records define.
const std::vector<prune_stage> &planned_graph::recorded() const {
    std::vector<const ggml_tensor *> weights;
    for (const ggml_tensor *t : facts_.tensors) {
        if (t->op == host.op_none && t->type == ggml_type_id) weights.push_back(t);
    }
    if (weights == weights_) return records_;
    std::vector<prune_stage> found;
    for (const ggml_tensor *t : weights) {
        prune_stage stage;
        if (!read_record(t, &stage)) continue;
        stage.reuse = stage.reuse && !settings_.mask_only;  // hidden tokens leave no keys
        found.push_back(stage);
    }
    std::stable_sort(found.begin(), found.end(), [](const auto &a, const auto &b) { return a.layer < b.layer; });
    const auto same_layer = [](const auto &a, const auto &b) { return a.layer == b.layer; };
    found.erase(std::unique(found.begin(), found.end(), same_layer), found.end());
    weights_.swap(weights);
    records_.swap(found);
    return records_;
}

void planned_graph::read(ggml_tensor **nodes, int n, std::vector<token_dim> dims) {
    facts_.read(nodes, n);
    dims_ = std::move(dims);
    is_planned_ = false;
}

const prune_plan &planned_graph::plan() {
    if (!is_planned_) {
        const std::vector<prune_stage> wanted = stages();
        plan_ = wanted.empty() ? prune_plan{} : plan_pruning(facts_, wanted, kern_, dims_);
        is_planned_ = true;
    }
    return plan_;
}

bool planned_graph::asks() const {
    const std::vector<prune_stage> all = stages();
    const auto waits = [](const prune_stage &s) { return s.measure->input == score_input::heads && !s.reuse; };
    return kern_ && !all.empty() && !settings_.mask_only && std::all_of(all.begin(), all.end(), waits);
}

}  // namespace agq
