#include "prune/pruner.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_set>

#include "format/attributes.h"
#include "graph/mask_view.h"
#include "graph/token_cut.h"
#include "prune/history.h"

namespace agq {

namespace {

const char *const several_masks = "in models with several attention masks (sliding windows) no ubatch can wait for it";

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
    own_cells_.assign(facts_.kinds.size(), {});
    for (size_t k = 0; has_cache && k < facts_.kinds.size(); ++k) {
        if (facts_.kinds[k].mask->ne[3] == 1) own_cells_[k] = find_own_cells(facts_, facts_.kinds[k]);
    }
    for (const attention_site &site : facts_.sites) {
        const ggml_tensor *mask = site.mask;
        // Inputs of the host: they are filled before the graph runs.
        if (!mask || mask->op != host.op_none || !mask->data || whole_.count(mask) != 0) continue;
        const bool readable = (mask->type == ggml_type_f16 || mask->type == ggml_type_f32) && mask->ne[2] == 1 &&
                              mask->ne[0] == site.k->ne[1] && mask->ne[1] >= site.q->ne[1] &&
                              mask->ne[3] == site.q->ne[3];
        if (!readable) continue;
        const std::vector<int32_t> &own = own_cells_[static_cast<size_t>(site.kind)];
        const bool known = own.size() == static_cast<size_t>(site.q->ne[1]);
        const char *rows = static_cast<const char *>(mask->data);
        whole_[mask] = groups_[mask].find(mask, rows, site.q->ne[1], known ? own.data() : nullptr);
    }
}

void pruner::plan_once() {
    if (is_planned_) return;
    const std::vector<prune_stage> wanted = stages();
    plan_ = wanted.empty() ? prune_plan{} : plan_pruning(facts_, wanted, kern_);
    is_planned_ = true;
}

/// What to do with this ubatch.
pruner::work pruner::decide(bool stores) {
    early_ = {};
    block_ = nullptr;
    if (settings_.source == prune_settings::source_kind::off) return work::keep;
    const int64_t n = facts_.n_tokens();
    const bool is_long = n >= settings_.min_tokens;
    if (!is_long && (!stores || n == 1)) return work::keep;
    plan_once();
    if (plan_.obstacle.empty() && plan_.cuts.empty()) return work::keep;
    std::string obstacle = plan_.obstacle;
    if (obstacle.empty()) obstacle = read_ubatch(facts_, &ubatch_);
    for (size_t c = 0; obstacle.empty() && c < plan_.cuts.size(); ++c) {
        const attention_site &site = facts_.sites[static_cast<size_t>(plan_.cuts[c].site)];
        obstacle = find_unseen(*plan_.cuts[c].stage.measure, ubatch_, site);
    }
    if (obstacle.empty()) {
        const auto of_heads = [](const prune_cut &cut) { return cut.stage.measure->input == score_input::heads; };
        const bool ends = ubatch_.wanted.back() || std::none_of(plan_.cuts.begin(), plan_.cuts.end(), of_heads);
        if (ends) return choose_work(stores);
        obstacle = stores                    ? find_deferral_obstacle()
                   : facts_.kinds.size() > 1 ? several_masks
                                             : "this kind of ubatch cannot wait for it";
        if (obstacle.empty()) return work::defer;
        obstacle = "a ubatch does not end its prompt, the score 'heads' needs the question at the end, and " +
                   obstacle + "; set n_batch and n_ubatch to the length of the prompts";
    }
    if (is_long) warn_once(obstacle);
    return work::keep;
}

/// For a ubatch that can be pruned: with which tokens of earlier ubatches, and whether all of them are enough.
pruner::work pruner::choose_work(bool stores) {
    const int64_t n = facts_.n_tokens();
    const bool is_long = n >= settings_.min_tokens;
    if (stores) {
        record_ = record_of(facts_, plan_.dims, plan_.cuts[0].crossing, true);
        const auto needed = [this](const token_block &block) { return is_needed(block); };
        block_ = store_.make_block(cells_.size(), record_.bytes, needed);
    }
    if (stores && store_.has_rows() && !ubatch_.kinds[0].has_window) {
        early_tokens &tokens = early_.tokens;
        tokens = find_early_tokens(facts_, 0, cells_, site_, hidden_, store_, record_.bytes);
        // Only a threshold says how many dropped tokens a question brings back.
        const bool revives = tokens.is_known && !plan_.cuts[0].stage.rule.by_share;
        const auto is_out = [revives](const early_token &token) { return !token.is_deferred && !revives; };
        tokens.missing.erase(std::remove_if(tokens.missing.begin(), tokens.missing.end(), is_out),
                             tokens.missing.end());
        const int64_t deferred = static_cast<int64_t>(n_deferred());
        if (deferred > 0 && n + deferred < settings_.min_tokens) return work::keep;
        early_.keeps_own = n + deferred < settings_.min_tokens;
        if (!tokens.missing.empty() && !prepare_graph(tokens)) tokens.missing.clear();
        if (!tokens.missing.empty()) early_.graph = &graph_;
    }
    return is_long || early_.graph ? work::prune : work::keep;
}

size_t pruner::n_deferred() const {
    const auto &missing = early_.tokens.missing;
    const auto is_one = [](const early_token &token) { return token.is_deferred; };
    return static_cast<size_t>(std::count_if(missing.begin(), missing.end(), is_one));
}

// ---- the store ----

/// Whether this context prunes by heads, and so that tokens can wait for their question.
bool pruner::asks() {
    if (asks_ == answer::unknown && facts_.complete && !facts_.sites.empty()) {
        const std::vector<prune_stage> all = stages();
        const auto waits = [](const prune_stage &s) { return s.measure->input == score_input::heads && !s.reuse; };
        const bool yes = !all.empty() && !settings_.mask_only && kern_ && std::all_of(all.begin(), all.end(), waits);
        asks_ = yes ? answer::yes : answer::no;
        if (yes) first_layer_ = all[0].layer;
    }
    return asks_ == answer::yes;
}

/// Reads what the store needs to know of the ubatch, before the graph may use the memory of its inputs again. Returns
/// whether the store can be used.
bool pruner::read_own() {
    const int64_t n = facts_.n_tokens();
    if (n == 0 || !asks() || !facts_.complete || facts_.kinds.size() != 1 || facts_.mask->ne[3] != 1 ||
        !facts_.positions || !facts_.k_cells || facts_.positions->ne[0] != n || facts_.k_cells->ne[0] != n ||
        facts_.mask->ne[1] != n) {
        return false;
    }
    int site = 0;
    // Keys of the first layer do not depend on the tokens in front.
    if (!find_site(facts_, first_layer_, &site).empty() || site < 1) return false;
    site_ = static_cast<size_t>(site);
    keys_ = key_rows::of(facts_.sites[site_].cache);
    next_keys_ = key_rows::of(facts_.sites[site_ + 1].cache);
    n_cells_ = root_of(facts_.sites[site_].cache)->ne[1];
    for (const attention_site &s : facts_.sites) {
        if (root_of(s.cache)->ne[2] != 1 || s.max_bias != 0) return false;  // streams of sequences; ALiBi
    }
    if (own_cells_[0].size() != static_cast<size_t>(n)) return false;
    cells_ = own_cells_[0];
    const int32_t *positions = static_cast<const int32_t *>(facts_.positions->data);
    positions_.assign(positions, positions + n);
    ids_.clear();
    if (facts_.tokens && facts_.tokens->ne[0] == n) {
        const int32_t *ids = static_cast<const int32_t *>(facts_.tokens->data);
        ids_.assign(ids, ids + n);
    }
    return true;
}

/// Whether the cache still holds a deferred token of the block.
bool pruner::is_needed(const token_block &block) const {
    const key_rows keys = key_rows::of(facts_.sites[site_].cache), next = key_rows::of(facts_.sites[site_ + 1].cache);
    const std::vector<char> mark = deferral_mark(next);
    for (size_t i = 0; i < block.cells.size(); ++i) {
        const int32_t cell = block.cells[i];
        if (is_deferred(next, cell, mark) && token_fingerprint(keys, cell) == block.fingerprints[i]) return true;
    }
    return false;
}

/// The reason why this ubatch cannot wait for its question, empty if it can.
std::string pruner::find_deferral_obstacle() {
    if (std::any_of(ubatch_.wanted.begin(), ubatch_.wanted.end(), [](uint8_t is) { return is != 0; })) {
        return "logits of a token within it are requested";
    }
    if (ubatch_.kinds[0].has_window) return "the attention has a sliding window";
    std::string obstacle = find_value_obstacle(facts_, cells_);
    if (!obstacle.empty()) return obstacle;
    record_ = record_of(facts_, plan_.dims, plan_.cuts[0].crossing, true);
    early_.tokens = find_early_tokens(facts_, 0, cells_, site_, hidden_, store_, record_.bytes);
    if (!early_.tokens.is_known) return "the cache holds tokens that this context has not computed";
    early_.tokens.missing.clear();
    int32_t end = 0;
    for (int32_t cell : cells_) end = std::max(end, cell + 1);
    if (!graph_.fits(facts_) || !graph_.reaches_cell(end - 1) || graph_.tokens() < plan_.tokens) {
        const std::string reason = graph_.capture(facts_, plan_);
        if (!reason.empty()) return reason;
    }
    const auto needed = [this](const token_block &block) { return is_needed(block); };
    block_ = store_.make_block(cells_.size(), record_.bytes, needed);
    return block_ ? "" : "the store of waiting tokens is full";
}

/// Makes sure that the early graph can compute these tokens.
bool pruner::prepare_graph(const early_tokens &tokens) {
    if (graph_.fits(facts_) && graph_.reaches(tokens)) return true;
    if (facts_.n_tokens() > 1 && facts_.complete) {
        plan_once();
        if (plan_.obstacle.empty() && !plan_.cuts.empty() && graph_.capture(facts_, plan_).empty() &&
            graph_.reaches(tokens)) {
            return true;
        }
    }
    return false;
}

/// The cells of deferred tokens that this ubatch sees.
const std::vector<int32_t> &pruner::seen_deferred() {
    static const std::vector<dropped_cell> nothing;
    const int last = static_cast<int>(facts_.sites.size()) - 1;
    // Where there are several kinds of attention, no token waits.
    return deferred_.find(facts_, facts_.kinds.size() == 1 ? hidden_.cells(hidden_.level(last)) : nothing);
}

/// Warns if this ubatch sees more deferred tokens than are computed for it.
void pruner::warn_of_lost(size_t seen, size_t computed) {
    if (!has_warned_of_lost_ && seen > computed) {
        has_warned_of_lost_ = true;
        log_line(
            log_warn,
            "token pruning: the beginning of a prompt is not seen, because its state was saved before the question "
            "came and loaded in another context, or too much was computed since; compute the prompt again");
    }
}

/// Computes the deferred tokens of these cells, which this ubatch sees, without a choice.
ggml_status pruner::compute_deferred(std::vector<int32_t> open, const segment_fn &segment) {
    if (!store_.has_rows()) return status_success;
    bool any = false;
    for (int64_t row = 0; row < facts_.mask->ne[1] && !open.empty(); ++row) {
        const mask_row mask(facts_.mask, row, 0);
        const auto seen = [&](int32_t cell) { return !mask.hides(cell); };
        if (std::none_of(open.begin(), open.end(), seen)) continue;
        early_tokens tokens = find_early_tokens(facts_, row, cells_, site_, hidden_, store_, graph_.record_bytes());
        const auto is_out = [&](const early_token &token) {
            return !token.is_deferred || std::find(open.begin(), open.end(), token.cell) == open.end();
        };
        tokens.missing.erase(std::remove_if(tokens.missing.begin(), tokens.missing.end(), is_out),
                             tokens.missing.end());
        open.erase(std::remove_if(open.begin(), open.end(), seen), open.end());
        if (tokens.missing.empty() || !prepare_graph(tokens)) continue;
        any = true;
        graph_.begin(tokens);
        std::vector<int32_t> all(tokens.missing.size());
        for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
        for (size_t s = 1; s < graph_.segments(); ++s) {
            const ggml_status status = graph_.run(s, all, hidden_, facts_.tensors[0]->buffer, segment);
            if (status != status_success) {
                defer_again(tokens);
                return status;
            }
        }
    }
    if (any) last_ = form::none;
    return status_success;
}

/// Undoes what an aborted run may have done to tokens that waited.
void pruner::defer_again(const early_tokens &tokens) {
    for (const early_token &token : tokens.missing) {
        if (!token.is_deferred) continue;
        for (size_t s = site_ + 1; s < facts_.sites.size(); ++s) {
            const key_rows rows = key_rows::of(facts_.sites[s].cache);
            std::memset(const_cast<char *>(rows.row(token.cell, 0)), 0, rows.row_bytes);
        }
        const std::vector<char> mark = deferral_mark(next_keys_);
        std::memcpy(const_cast<char *>(next_keys_.row(token.cell, 0)), mark.data(), mark.size());
    }
}

/// Runs a graph without attention. If it turns keys, because positions have changed, the store follows.
ggml_status pruner::run_shift(ggml_tensor **nodes, int n, bool repeated, const compute_fn &compute) {
    const ggml_tensor *shift = nullptr;
    for (size_t i = static_cast<size_t>(facts_.n_nodes); i < facts_.tensors.size(); ++i) {
        const ggml_tensor *leaf = facts_.tensors[i];
        if (leaf->type == ggml_type_i32 && leaf->flags & ggml_flag_input && leaf->ne[0] == n_cells_) shift = leaf;
    }
    struct turned {
        int64_t cell;
        uint64_t fingerprint;
        int32_t shift;
        bool is_deferred;
    };
    std::vector<turned> all;
    std::unordered_set<uint64_t> unmoved;
    const std::vector<char> mark = deferral_mark(next_keys_);
    for (int64_t c = 0; shift && c < n_cells_; ++c) {
        const int32_t by = static_cast<const int32_t *>(shift->data)[c];
        const uint64_t fingerprint = token_fingerprint(keys_, c);
        if (by == 0) {
            unmoved.insert(fingerprint);
        } else {
            all.push_back({c, fingerprint, by, is_deferred(next_keys_, c, mark)});
        }
    }
    last_ = form::host;
    const ggml_status status = compute(nodes, n, repeated, {});
    if (status != status_success) return status;
    for (const turned &t : all) {
        const uint64_t now = token_fingerprint(keys_, t.cell);
        if (now != t.fingerprint) store_.rename(t.fingerprint, now, t.shift);
        if (t.is_deferred) {
            std::memcpy(const_cast<char *>(next_keys_.row(t.cell, 0)), mark.data(), mark.size());
        }
    }
    std::unordered_set<uint64_t> still;
    for (const turned &t : all) still.insert(token_fingerprint(keys_, t.cell));
    for (const turned &t : all) {
        if (unmoved.count(t.fingerprint) == 0 && still.count(t.fingerprint) == 0) store_.forget(t.fingerprint);
    }
    return status;
}

/// Stores the tokens of the ubatch, which have been computed.
void pruner::store_own() {
    if (!block_) block_ = std::make_shared<token_block>();
    const key_rows keys = key_rows::of(facts_.sites[site_].cache);
    block_->cells = cells_;
    for (int32_t cell : cells_) block_->fingerprints.push_back(token_fingerprint(keys, cell));
    store_.put(block_, positions_, ids_);
}

// ---- a run ----

ggml_status pruner::run_pruned(bool stores, int n_threads, const segment_fn &segment) {
    last_ = form::pruned;
    if (stores && block_ && block_->rows) {
        early_.record = &record_;
        for (size_t i = 0; i < cells_.size(); ++i) early_.records.push_back(block_->rows.get() + i * record_.bytes);
    }
    const ggml_status status =
        pruned_.run(facts_, plan_, hidden_, settings_.mask_only, ubatch_, whole_, early_, n_threads, segment);
    if (status != status_success) defer_again(early_.tokens);
    prune_history &history = prune_history::of_thread();
    history.record(ubatch_.position, pruned_.layer_of_token());
    for (size_t i = 0; i < early_.tokens.missing.size(); ++i) {
        history.record_at(early_.tokens.missing[i].place, pruned_.layer_of_early()[i]);
    }
    history.record_importance(pruned_.importance());
    history.record_head_weights(pruned_.head_weights());
    return status;
}

ggml_status pruner::run_deferred(const segment_fn &segment) {
    last_ = form::pruned;
    early_.record = &record_;
    for (size_t i = 0; i < cells_.size(); ++i) early_.records.push_back(block_->rows.get() + i * record_.bytes);
    early_.block = block_.get();
    early_.mark = deferral_mark(key_rows::of(facts_.sites[site_ + 1].cache));
    const ggml_status status = pruned_.defer(facts_, plan_, hidden_, ubatch_, whole_, early_, segment);
    prune_history::of_thread().record_kept(ubatch_.position, cells_.size());
    return status;
}

/// Runs the graph with all its tokens.
ggml_status pruner::run_whole(ggml_tensor **nodes, int n, bool repeated, bool any_hidden, bool counts,
                              const compute_fn &compute) {
    if (facts_.n_tokens() > 0) {
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
    masked_.fill(facts_, hidden_, whole_, own_cells_);
    return compute(masked_.nodes().data(), n, same, masked_.choices());
}

ggml_status pruner::run(ggml_tensor **nodes, int n, bool repeated, int n_threads, const compute_fn &compute) {
    if (!repeated) read_graph(nodes, n);
    // Only steps of one token leave all marks as they are.
    if (facts_.n_tokens() != 1) deferred_.forget();
    if (facts_.sites.empty() && !store_.empty()) return run_shift(nodes, n, repeated, compute);
    const bool has_cache = !facts_.ambiguous && !facts_.unknown_store && !facts_.sites.empty();
    bool any_hidden = has_cache && hidden_.find(facts_);
    divide(has_cache);
    const bool stores = has_cache && read_own();
    const auto segment = [&](ggml_tensor **part, int size, const key_choices &choices) {
        return compute(part, size, false, choices);
    };
    ggml_status status = status_success;
    switch (decide(stores)) {
        case work::prune:
            if (any_hidden) warn_of_lost(seen_deferred().size(), n_deferred());
            status = run_pruned(stores, n_threads, segment);
            break;
        case work::defer:
            status = run_deferred(segment);
            break;
        case work::keep: {
            std::vector<int32_t> open = any_hidden && facts_.complete ? seen_deferred() : std::vector<int32_t>{};
            if (!open.empty()) {
                const size_t n_open = open.size();
                if (stores) status = compute_deferred(std::move(open), segment);
                if (status != status_success) return status;
                any_hidden = hidden_.find(facts_);
                deferred_.forget();
                warn_of_lost(n_open, any_hidden ? n_open - seen_deferred().size() : n_open);
            }
            const auto is_one = [](const attention_kind &kind) { return kind.k_cells && kind.mask->ne[3] == 1; };
            const bool counts = has_cache && std::all_of(facts_.kinds.begin(), facts_.kinds.end(), is_one);
            status = run_whole(nodes, n, repeated, any_hidden, counts, compute);
            block_ = nullptr;
            break;
        }
    }
    if (stores && status == status_success) store_own();
    return status;
}

}  // namespace agq
