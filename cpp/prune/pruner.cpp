#include "prune/pruner.h"

#include <algorithm>

#include "graph/mask_view.h"
#include "prune/history.h"

namespace agq {

namespace {

const char *const all_wanted = "the logits of all tokens are requested";
const char *const several_places =
    "several sequences of a batch share tokens, or the tokens of one do not stand side by side";

}  // namespace

void pruner::read_graph(ggml_tensor **nodes, int n, std::vector<token_dim> dims) {
    graph_.read(nodes, n, std::move(dims));
    groups_.clear();
    masked_.clear();
    last_ = form::none;
}

void pruner::warn_once(const std::string &obstacle) {
    if (warned_.insert(obstacle).second) log_line(log_warn, "token pruning is off: " + obstacle);
}

/// Groups the tokens of this call by the host's masks.
void pruner::group(bool has_cache) {
    whole_.clear();
    own_cells_.assign(facts().kinds.size(), {});
    for (size_t k = 0; has_cache && k < facts().kinds.size(); ++k) {
        if (facts().kinds[k].mask->ne[3] == 1) own_cells_[k] = find_own_cells(facts(), facts().kinds[k]);
    }
    for (const attention_site &site : facts().sites) {
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

/// Divides the ubatch into parts of one sequence each, and decides what to do with them. `may_wait`: whether its tokens
/// can be stored to wait. Returns whether any token leaves the graph.
bool pruner::divide(bool may_wait) {
    const prune_settings &settings = graph_.settings();
    const bool has_streams = facts().mask && facts().mask->ne[3] > 1;
    if (settings.source == prune_settings::source_kind::off || has_streams) return false;
    const int64_t n = facts().n_tokens();
    const bool is_generation = facts().out_ids && facts().out_ids->ne[0] >= n;
    if (n < settings.min_tokens && (!may_wait || is_generation || (n == 1 && !graph_.counts_one()))) return false;
    const prune_plan &plan = graph_.plan();
    if (plan.obstacle.empty() && plan.cuts.empty()) return false;
    ubatch_ = {};
    const std::vector<ubatch_part> &parts = ubatch_.facts.parts;
    const auto is_long = [&](const ubatch_part &part) { return part.n >= settings.min_tokens; };
    const std::string obstacle = plan.obstacle.empty() ? read_ubatch(facts(), &ubatch_.facts) : plan.obstacle;
    if (!obstacle.empty()) {
        const bool matters =
            parts.empty() ? n >= settings.min_tokens : std::any_of(parts.begin(), parts.end(), is_long);
        if (matters) warn_once(obstacle);
        return false;
    }
    ubatch_.work.parts.resize(parts.size());
    if (may_wait) waiting_.begin(&ubatch_.work);
    for (size_t p = 0; p < parts.size(); ++p) {
        const std::string reason = choose_work(parts[p], may_wait, &ubatch_.work.parts[p]);
        const bool is_whole = parts[p].is_alone || parts[p].is_wanted;  // else the sequence has more tokens here
        if (!reason.empty() && (is_long(parts[p]) || (!is_whole && n >= settings.min_tokens))) warn_once(reason);
    }
    if (may_wait) waiting_.find_candidates(&ubatch_);
    const auto leaves = [](const part_work &work) { return work.what != part_work::kind::keep; };
    return std::any_of(ubatch_.work.parts.begin(), ubatch_.work.parts.end(), leaves);
}

/// What to do with a part, but for candidates of earlier ubatches. Returns the reason if its tokens must be kept, empty
/// if there is none.
std::string pruner::choose_work(const ubatch_part &part, bool may_wait, part_work *work) {
    if (part.is_wanted) return all_wanted;
    if (!part.is_alone) return several_places;
    if (part.n < graph_.settings().min_tokens && !may_wait) return "";
    const std::vector<prune_cut> &cuts = graph_.plan().cuts;
    for (const prune_cut &cut : cuts) {
        const attention_site &site = facts().sites[static_cast<size_t>(cut.site)];
        std::string unseen = find_unseen(*cut.stage.measure, part, site);
        if (!unseen.empty()) return unseen;
    }
    const auto of_heads = [](const prune_cut &cut) { return cut.stage.measure->input == score_input::heads; };
    const bool ends = ubatch_.facts.wanted[static_cast<size_t>(part.last())] != 0;
    if (ends || std::none_of(cuts.begin(), cuts.end(), of_heads)) {
        work->what = part_work::kind::prune;
        if (may_wait) waiting_.reserve(part, work);
        return "";
    }
    const std::string obstacle = may_wait ? waiting_.defer(ubatch_.facts, part, work) : waiting_.obstacle();
    if (obstacle.empty()) return "";
    return "a ubatch does not end its prompt, the score 'heads' needs the question at the end, and " + obstacle +
           "; set n_batch and n_ubatch to the length of the prompts";
}

/// Computes tokens that wait for a question, but are seen by tokens that do not choose among them.
ggml_status pruner::compute_open(const divided_ubatch *divided, bool may_wait, bool *any_hidden,
                                 const segment_fn &segment) {
    std::vector<int32_t> open = waiting_.find_open(divided);
    if (open.empty()) return status_success;
    waiting_.forget_marks();
    if (may_wait) {
        const ggml_status status = waiting_.compute(open, segment);
        if (status != status_success) return status;
        last_ = form::none;
    }
    *any_hidden = hidden_.find(facts());
    waiting_.warn_of_lost(*any_hidden ? waiting_.find_open(divided) : std::vector<int32_t>{});
    return status_success;
}

/// Runs a ubatch some of whose tokens leave.
ggml_status pruner::run_divided(int n_threads, const segment_fn &segment) {
    last_ = form::divided;
    waiting_.forget_marks();
    const run_input in{facts(),       graph_.plan(), hidden_,  graph_.settings().mask_only,
                       ubatch_.facts, ubatch_.work,  n_threads};
    const ggml_status status = pruned_.run(in, whole_, segment);
    const std::vector<ubatch_part> &parts = ubatch_.facts.parts;
    for (const part_work &work : ubatch_.work.parts) {
        if (status != status_success) waiting_.defer_again(work.tokens);
    }
    const part_run &last = pruned_.part(parts.size() - 1);
    prune_history &history = prune_history::of_thread();
    history.record(parts.back().position, last.layer_of_token());
    const std::vector<early_token> &candidates = last.work().tokens.missing;
    for (size_t i = 0; i < candidates.size(); ++i) history.record_at(candidates[i].place, last.layer_of_early()[i]);
    history.record_importance(last.importance());
    history.record_head_weights(last.head_weights());
    return status;
}

/// Runs the graph with all its tokens.
ggml_status pruner::run_whole(ggml_tensor **nodes, int n, bool repeated, bool any_hidden, bool has_cache,
                              const compute_fn &compute) {
    const auto is_one = [](const attention_kind &kind) { return kind.k_cells && kind.mask->ne[3] == 1; };
    const bool counts = has_cache && std::all_of(facts().kinds.begin(), facts().kinds.end(), is_one);
    if (facts().n_tokens() > 0) {
        const int32_t position = counts              ? find_position(facts(), 0)
                                 : facts().positions ? *static_cast<const int32_t *>(facts().positions->data)
                                                     : 0;
        prune_history::of_thread().record_kept(position, static_cast<size_t>(facts().n_tokens()));
    }
    const form now = any_hidden || masked_.is_built() ? form::masked : form::host;
    const bool same = repeated && last_ == now;
    last_ = now;
    if (now == form::host) return compute(nodes, n, same, whole_);
    if (!masked_.is_built()) masked_.build(facts());
    masked_.fill(facts(), hidden_, whole_, own_cells_);
    return compute(masked_.nodes().data(), n, same, masked_.choices());
}

/// Whether this graph holds several streams, some of whose tokens may be dropped or may see tokens that wait.
bool pruner::needs_streams(bool any_hidden) {
    if (!facts().mask || facts().mask->ne[3] == 1) return false;
    const prune_settings &settings = graph_.settings();
    if (settings.source == prune_settings::source_kind::off) return false;
    const int64_t n = facts().n_tokens(), each = n / facts().mask->ne[3];
    bool waits = any_hidden && !waiting_.is_empty() && !waiting_.find_open(nullptr).empty();
    waits = waits || waiting_.may_begin_to_wait();
    if (!waits && (each < settings.min_tokens || graph_.stages().empty())) return false;
    const bool is_wanted = facts().out_ids && facts().out_ids->ne[0] >= n;
    const std::string obstacle = is_wanted && !waits ? all_wanted : streams_.plan(facts());
    if (!obstacle.empty()) warn_once(obstacle);
    return obstacle.empty() && streams_.begin();
}

/// Runs the graphs of single streams one after another.
ggml_status pruner::run_streams(int n_threads, const compute_fn &compute) {
    is_of_host_ = false;
    for (int64_t s = 0; s < streams_.streams(); ++s) {
        std::vector<ggml_tensor *> &nodes = streams_.nodes(s);
        const int n = static_cast<int>(nodes.size());
        read_graph(nodes.data(), n, streams_.dims());
        const ggml_status status = run_graph(nodes.data(), n, false, true, hidden_.find(facts()), n_threads, compute);
        if (status != status_success) return status;
        streams_.keep_results();
    }
    streams_.finish();
    return status_success;
}

/// Runs a graph that was read, of the host or of a single stream.
ggml_status pruner::run_graph(ggml_tensor **nodes, int n, bool repeated, bool has_cache, bool any_hidden, int n_threads,
                              const compute_fn &compute) {
    group(has_cache);
    const bool stores = has_cache && waiting_.read_own(own_cells_), may_wait = stores && facts().mask->ne[3] == 1;
    const auto segment = [&](ggml_tensor **part, int size, const key_choices &choices) {
        return compute(part, size, false, choices);
    };
    const divided_ubatch *divided = divide(may_wait) ? &ubatch_ : nullptr;
    ggml_status status = status_success;
    if (any_hidden && facts().complete) status = compute_open(divided, may_wait, &any_hidden, segment);
    if (status != status_success) return status;
    if (divided) {
        waiting_.check_candidates(&ubatch_);
        status = run_divided(n_threads, segment);
    } else {
        status = run_whole(nodes, n, repeated, any_hidden, has_cache, compute);
    }
    if (stores && status == status_success) waiting_.store(divided);
    return status;
}

ggml_status pruner::run(ggml_tensor **nodes, int n, bool repeated, int n_threads, const compute_fn &compute) {
    const bool is_same = repeated && is_of_host_;
    is_of_host_ = is_same;  // a graph that was read in part only, for lack of memory, is read again
    if (!is_same) read_graph(nodes, n);
    is_of_host_ = true;
    const bool is_generation = facts().out_ids && facts().out_ids->ne[0] >= facts().n_tokens();
    if (!is_generation) waiting_.forget_marks();  // only steps of answers are sure to leave all marks as they are
    if (facts().sites.empty() && !waiting_.is_empty()) {
        last_ = form::host;
        return waiting_.run_shift([&] { return compute(nodes, n, repeated, {}); });
    }
    const bool has_cache = !facts().ambiguous && !facts().unknown_store && !facts().sites.empty();
    const bool any_hidden = has_cache && hidden_.find(facts());
    if (has_cache && needs_streams(any_hidden)) return run_streams(n_threads, compute);
    return run_graph(nodes, n, is_same, has_cache, any_hidden, n_threads, compute);
}

}  // namespace agq
