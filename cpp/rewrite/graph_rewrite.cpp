// The rewriting pass. The host's tensors are never changed. Nodes without AGQ4 are passed on unchanged; the others are
// replaced by custom nodes that write to the same memory.
#include "rewrite/graph_rewrite.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "graph/graph_facts.h"
#include "host/profile.h"

namespace agq {

namespace {

bool is_product(const ggml_tensor *node) {
    return node->op == host.op_mul_mat || node->op == host.op_mul_mat_id;
}

}  // namespace

bool uses_agq4(const ggml_tensor *node) {
    return node->src[0] && node->src[0]->type == ggml_type_id && (is_product(node) || node->op == host.op_get_rows);
}

graph_rewriter::~graph_rewriter() {
    clear();
}

void graph_rewriter::clear() {
    if (context_) host.ggml_free(context_);
    context_ = nullptr;
    graph_ = nullptr;
    sets_.clear();
    products_.clear();
    q8_products_.clear();
    lookups_.clear();
    attentions_.clear();
    jobs_.clear();
    fusions_.clear();
    source_rows_.clear();
    expert_choices_.clear();
    expert_sums_.clear();
    choices_.clear();
    sums_.clear();
    clocks_.clear();
    thread_bytes_ = 0;
}

ggml_cgraph *graph_rewriter::rewrite(ggml_tensor **nodes, int n, bool repeated, const key_choices &choices,
                                     int n_threads, std::string *error) {
    if (!repeated || !graph_ || profiled_ != profile_enabled() || !weights_intact()) {
        clear();
        if (!build(nodes, n, error)) {
            clear();
            return nullptr;
        }
    }
    mixed_.begin_call(n_threads);
    for (activation_set &s : sets_) s.next.store(0, std::memory_order_relaxed);
    for (product &p : products_) p.next.store(0, std::memory_order_relaxed);
    for (source_rows &r : source_rows_) r.next.store(0, std::memory_order_relaxed);
    for (expert_choice &c : expert_choices_) c.next.store(0, std::memory_order_relaxed);
    for (expert_sum &s : expert_sums_) s.next.store(0, std::memory_order_relaxed);
    for (q8_product &p : q8_products_) {
        p.next_token.store(0, std::memory_order_relaxed);
        p.next_rows.store(0, std::memory_order_relaxed);
    }
    size_t thread_bytes = thread_bytes_;
    for (attention_job &a : attentions_) {
        const auto choice = choices.find(a.mask);
        const std::vector<key_group> *groups = choice == choices.end() ? nullptr : &choice->second;
        begin_attention(&a, groups, n_threads);
        const auto packs = [](const key_group &group) { return group.packs; };
        if (groups && std::any_of(groups->begin(), groups->end(), packs)) {
            thread_bytes = std::max(thread_bytes, packed_attention_bytes(a));
        }
    }
    scratch_.reserve(thread_bytes, n_threads);
    return graph_;
}

void graph_rewriter::find_chain(ggml_tensor **nodes, int output,
                                const std::unordered_map<const ggml_tensor *, int> &position,
                                const std::unordered_map<const ggml_tensor *, int> &uses) {
    const ggml_tensor *weights = soft_max_before(nodes[output]);
    attention_pattern found;
    if (!weights || !match_attention(weights, &found) || !found.plain) return;
    const ggml_tensor *scores = found.scores;
    const auto at = [&](const ggml_tensor *t) {
        const auto entry = position.find(t);
        return entry == position.end() ? -1 : entry->second;
    };
    const int soft_max_at = at(weights), scores_at = at(scores);
    if (soft_max_at < 0 || scores_at < 0 || found.k->type == ggml_type_id) return;
    // No other node may read what is skipped.
    if (uses.at(scores) != 1 || uses.at(weights) != 1 || (scores->flags | weights->flags) & ggml_flag_output) return;
    // The keys are read when the output is computed. So they must be in the cache, not in memory that is reused by
    // then.
    if (root_of(found.k)->op != host.op_none) return;
    attention_job &job = new_attention();
    if (!plan_attention_chain(found, nodes[output], &job)) {
        attentions_.pop_back();
        return;
    }
    const size_t floats = static_cast<size_t>(saved_query_floats(job.q));
    if (saved_queries_.size() < floats) saved_queries_.resize(floats);
    const auto assign = [&](int i, role r) {
        roles_[static_cast<size_t>(i)] = r;
        jobs_[i] = &job;
    };
    assign(scores_at, role::chain_scores);
    assign(soft_max_at, role::chain_soft_max);
    assign(output, role::chain_output);
}

void graph_rewriter::assign_roles(ggml_tensor **nodes, int n) {
    roles_.assign(static_cast<size_t>(n), role::keep);
    const bool is_stock = std::none_of(nodes, nodes + n, uses_agq4);
    if (is_stock && !take_all_) return;  // a stock model that is only profiled stays unchanged
    bool has_soft_max = false;
    for (int i = 0; i < n; ++i) {
        role &r = roles_[static_cast<size_t>(i)];
        if (uses_agq4(nodes[i])) {
            r = nodes[i]->op == host.op_get_rows ? role::row_lookup : role::product;
        } else if (nodes[i]->op == host.op_flash_attn_ext && attention_) {
            attention_pattern found;
            attention_job &job = new_attention();
            if (match_attention(nodes[i], &found) && plan_flash_attention(found, nodes[i], &job)) {
                r = role::flash_attention;
                jobs_[i] = &job;
            } else {
                attentions_.pop_back();
            }
        } else if (nodes[i]->op == host.op_soft_max) {
            has_soft_max = true;
        } else if (!is_stock && kern_->q8 && is_q8_product(nodes[i])) {
            r = role::q8_product;
        }
    }
    if (fuse_) {
        assign_fusions(nodes, n);
        assign_experts(nodes, n);
    }
    if (!has_soft_max || !attention_) return;
    std::unordered_map<const ggml_tensor *, int> position, uses;
    for (int i = 0; i < n; ++i) {
        position[nodes[i]] = i;
        for (const ggml_tensor *src : nodes[i]->src) {
            if (src) ++uses[src];
        }
        if (nodes[i]->view_src) ++uses[nodes[i]->view_src];
    }
    for (int i = 0; i < n; ++i) {
        if (nodes[i]->op == host.op_mul_mat && roles_[static_cast<size_t>(i)] == role::keep)
            find_chain(nodes, i, position, uses);
    }
}

bool graph_rewriter::build(ggml_tensor **nodes, int n, std::string *error) {
    assign_roles(nodes, n);
    // A product becomes at most three nodes: routing, quantization, multiplication.
    const size_t n_replaced =
        static_cast<size_t>(n) - static_cast<size_t>(std::count(roles_.begin(), roles_.end(), role::keep));
    mixed_.plan(nodes, n);
    profiled_ = profile_enabled();
    const size_t n_clocks = profiled_ ? 2 * static_cast<size_t>(n) + 1 : 0;
    const size_t n_nodes = static_cast<size_t>(n) + 2 * n_replaced + 2 + n_clocks;
    const size_t bytes = host.ggml_tensor_overhead() * (3 * n_replaced + 2 + n_clocks) +
                         host.ggml_graph_overhead_custom(n_nodes, false) + 1024;
    if (memory_.size() < bytes) memory_.resize(bytes);
    context_ = host.ggml_init({memory_.size(), memory_.data(), true});
    if (!context_) throw std::bad_alloc();
    graph_ = host.ggml_new_graph_custom(context_, n_nodes, false);
    if (profiled_) add_clock("");
    for (int i = 0; i < n; ++i) {
        bool good = true;
        if (i == mixed_.node()) {
            add_custom(nodes[i], nullptr, 0, node::measure_importance, &mixed_);
            add_custom(nodes[i], nullptr, 0, node::choose_bits, &mixed_);
        }
        switch (roles_[static_cast<size_t>(i)]) {
            case role::keep:
                host.ggml_graph_add_node(graph_, nodes[i]);
                break;
            case role::product:
                good = add_product(nodes, n, i, error);
                break;
            case role::row_lookup:
                good = add_row_lookup(nodes[i], error);
                break;
            case role::q8_product:
                add_q8_product(nodes[i]);
                break;
            case role::fused:
            case role::joined:
                break;
            case role::fused_source:
                good = add_fused_source(nodes[i], fusions_.at(i), nodes, error);
                break;
            case role::expert_choice:
                add_expert_choice(nodes[i], choices_.at(i));
                break;
            case role::expert_sum:
                add_expert_sum(nodes[i], sums_.at(i));
                break;
            case role::flash_attention:
            case role::chain_output:
                add_attention(nodes[i], jobs_.at(i));
                break;
            case role::chain_scores: {
                attention_job *job = jobs_.at(i);
                job->saved_q = saved_queries_.data();
                add_custom(nodes[i], &nodes[i]->src[1], 1, node::save_queries, job);
                break;
            }
            case role::chain_soft_max:
                break;
        }
        if (!good) return false;
        const bool followed = i + 1 < n && nodes[i]->op == host.op_rms_norm && nodes[i + 1]->op == host.op_mul;
        const role was = roles_[static_cast<size_t>(i)];
        const bool ours = was == role::fused || was == role::fused_source || was == role::expert_choice ||
                          was == role::expert_sum || was == role::joined || was == role::product;
        if (profiled_ && !is_empty_op(nodes[i]->op) && !followed && !ours) add_clock(profile_label(nodes[i]));
    }
    return true;
}

void graph_rewriter::assign_fusions(ggml_tensor **nodes, int n) {
    std::vector<bool> is_product;
    is_product.reserve(roles_.size());
    for (role r : roles_) is_product.push_back(r == role::product);
    const auto same_format = [&](int i, int j) {
        std::string error;  // found again, and reported, when the product is added
        const tensor_attributes *a = find_attributes(nodes[i]->src[0], &error);
        const tensor_attributes *b = find_attributes(nodes[j]->src[0], &error);
        const auto same = [](const auto &x, const auto &y) { return x == y || x->same_activations(*y); };
        return a && b && std::equal(a->begin(), a->end(), b->begin(), b->end(), same);
    };
    for (fusion &f : find_fusions(nodes, n, is_product, same_format)) {
        for (int i : f.replaced) roles_[static_cast<size_t>(i)] = role::fused;
        const int last = f.replaced.back();
        roles_[static_cast<size_t>(last)] = role::fused_source;
        fusions_.emplace(last, std::move(f));
    }
}

void graph_rewriter::assign_experts(ggml_tensor **nodes, int n) {
    const auto assign = [this](const std::vector<int> &replaced, role last) {
        const auto is_kept = [this](int i) { return roles_[static_cast<size_t>(i)] == role::keep; };
        if (!std::all_of(replaced.begin(), replaced.end(), is_kept)) return false;
        for (int i : replaced) roles_[static_cast<size_t>(i)] = role::fused;
        roles_[static_cast<size_t>(replaced.back())] = last;
        return true;
    };
    for (expert_choice_match &m : find_expert_choices(nodes, n)) {
        if (assign(m.replaced, role::expert_choice)) choices_.emplace(m.replaced.back(), std::move(m));
    }
    for (expert_sum_match &m : find_expert_sums(nodes, n)) {
        if (assign(m.replaced, role::expert_sum)) sums_.emplace(m.replaced.back(), std::move(m));
    }
}

}  // namespace agq
