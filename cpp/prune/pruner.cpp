#include "prune/pruner.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "format/attributes.h"
#include "prune/history.h"

namespace agq {

namespace {

/// Reads the pruning record of a layer's weight. Returns false if there is none. Damaged attributes are reported by the
/// products that use them.
bool read_record(const ggml_tensor *weights, prune_stage *stage) {
    if (weights->type != ggml_type_id || std::strncmp(weights->name, "blk.", 4) != 0 || !weights->data ||
        weights->view_src || !is_shape(weights->ne[1], weights->ne[0])) {
        return false;
    }
    const tile *tiles = static_cast<const tile *>(weights->data);
    if (!(read_header(tiles, weights->ne[1], weights->ne[0]).flags & flag_pruning)) return false;
    std::string ignored;
    const auto attributes = parse_attributes(tiles, weights->ne[1], weights->ne[0], &ignored);
    if (!attributes || !attributes->prunes) return false;
    stage->layer = std::atoi(weights->name + 4);
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

std::vector<prune_stage> pruner::stages() const {
    if (settings_.source == prune_settings::source_kind::off) return {};
    const bool is_list = settings_.source == prune_settings::source_kind::list;
    const auto is_incomplete = [](const prune_stage &s) {
        return (s.measure->needs_direction && !s.direction) ||
               (s.measure->input == score_input::heads && s.heads.empty());
    };
    const bool needs_file = std::any_of(settings_.stages.begin(), settings_.stages.end(), is_incomplete);
    if (is_list && !needs_file) return settings_.stages;
    std::vector<prune_stage> found = recorded();
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
std::vector<prune_stage> pruner::recorded() const {
    std::vector<prune_stage> found;
    for (const ggml_tensor *t : facts_.tensors) {
        prune_stage stage;
        if (t->op != host.op_none || !read_record(t, &stage)) continue;
        stage.reuse = stage.reuse && !settings_.mask_only;  // hidden tokens leave no keys
        found.push_back(stage);
    }
    std::stable_sort(found.begin(), found.end(), [](const auto &a, const auto &b) { return a.layer < b.layer; });
    const auto same_layer = [](const auto &a, const auto &b) { return a.layer == b.layer; };
    found.erase(std::unique(found.begin(), found.end(), same_layer), found.end());
    return found;
}

void pruner::read_graph(ggml_tensor **nodes, int n) {
    facts_.read(nodes, n);
    groups_.clear();
    masked_.clear();
    is_planned_ = false;
    last_ = form::none;
}

void pruner::warn_once(const std::string &obstacle) {
    if (warned_.insert(obstacle).second) log_line(log_warn, "token pruning is off: " + obstacle);
}

/// Divides the tokens of this call by the host's masks.
void pruner::divide(bool has_cache) {
    whole_.clear();
    own_cells_.clear();
    if (has_cache && facts_.k_cells && facts_.mask->ne[3] == 1) {
        const int64_t *indices = static_cast<const int64_t *>(facts_.k_cells->data),
                      offset = cell_offset(facts_.sites[0]);
        for (int64_t t = 0; t < facts_.k_cells->ne[0]; ++t) {
            const int64_t cell = indices[t] - offset;
            if (cell < 0 || cell >= facts_.mask->ne[0]) {
                own_cells_.clear();
                break;
            }
            own_cells_.push_back(static_cast<int32_t>(cell));
        }
    }
    for (const attention_site &site : facts_.sites) {
        const ggml_tensor *mask = site.mask;
        // Inputs of the host: they are filled before the graph runs.
        if (!mask || mask->op != host.op_none || !mask->data || whole_.count(mask) != 0) continue;
        const bool readable = (mask->type == ggml_type_f16 || mask->type == ggml_type_f32) && mask->ne[2] == 1 &&
                              mask->ne[0] == site.k->ne[1] && mask->ne[1] >= site.q->ne[1] &&
                              mask->ne[3] == site.q->ne[3];
        if (!readable) continue;
        const bool known = mask == facts_.mask && own_cells_.size() == static_cast<size_t>(site.q->ne[1]);
        const char *rows = static_cast<const char *>(mask->data);
        whole_[mask] = groups_[mask].find(mask, rows, site.q->ne[1], known ? own_cells_.data() : nullptr);
    }
}

/// Whether this ubatch should and can be pruned.
bool pruner::may_prune() {
    if (settings_.source == prune_settings::source_kind::off) return false;
    if (facts_.n_tokens() < settings_.min_tokens) return false;
    if (!is_planned_) {
        const std::vector<prune_stage> wanted = stages();
        plan_ = wanted.empty() ? prune_plan{} : plan_pruning(facts_, wanted, kern_);
        is_planned_ = true;
    }
    if (plan_.obstacle.empty() && plan_.cuts.empty()) return false;
    std::string obstacle = plan_.obstacle;
    if (obstacle.empty()) obstacle = read_ubatch(facts_, &ubatch_);
    const auto asks = [](const prune_cut &cut) { return cut.stage.measure->input == score_input::heads; };
    if (obstacle.empty() && !ubatch_.wanted.back() && std::any_of(plan_.cuts.begin(), plan_.cuts.end(), asks)) {
        obstacle =
            "a ubatch does not end its prompt, and the score 'heads' needs the question at the end; set n_batch and "
            "n_ubatch to the length of the prompts";
    }
    if (!obstacle.empty()) warn_once(obstacle);
    return obstacle.empty();
}

ggml_status pruner::run(ggml_tensor **nodes, int n, bool repeated, int n_threads, const compute_fn &compute) {
    if (!repeated) read_graph(nodes, n);
    // Models with several masks are never pruned, so nothing needs hiding.
    const bool has_cache = facts_.mask && !facts_.ambiguous && !facts_.unknown_store && !facts_.sites.empty();
    const bool any_hidden = has_cache && hidden_.find(facts_);
    divide(has_cache);
    if (may_prune()) {
        last_ = form::pruned;
        const auto segment = [&](ggml_tensor **part, int size, const key_choices &choices) {
            return compute(part, size, false, choices);
        };
        const ggml_status status =
            pruned_.run(facts_, plan_, hidden_, settings_.mask_only, ubatch_, whole_, n_threads, segment);
        prune_history::of_thread().record(ubatch_.position, pruned_.layer_of_token());
        prune_history::of_thread().record_importance(pruned_.importance());
        prune_history::of_thread().record_head_weights(pruned_.head_weights());
        return status;
    }
    if (facts_.n_tokens() > 0) {
        const bool counts = has_cache && facts_.k_cells && facts_.mask->ne[3] == 1;
        const int32_t position = counts             ? first_position(facts_)
                                 : facts_.positions ? *static_cast<const int32_t *>(facts_.positions->data)
                                                    : 0;
        prune_history::of_thread().record_kept(position, static_cast<size_t>(facts_.n_tokens()));
    }
    const form now = any_hidden || masked_.is_built() ? form::masked : form::host;
    const bool same = repeated && last_ == now;
    last_ = now;
    if (now == form::host) return compute(nodes, n, same, whole_);
    if (!masked_.is_built()) masked_.build(facts_);
    const auto whole = whole_.find(facts_.mask);
    masked_.fill(facts_, hidden_, whole == whole_.end() ? nullptr : &whole->second,
                 own_cells_.empty() ? nullptr : own_cells_.data());
    return compute(masked_.nodes().data(), n, same, masked_.choices());
}

}  // namespace agq
