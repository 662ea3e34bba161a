// The nodes of ours in a rewritten graph: each `add` adds the nodes that replace some of the host's.
#include <algorithm>
#include <cstring>

#include "host/profile.h"
#include "host/tensor_rows.h"
#include "nodes/decode_attention.h"
#include "rewrite/graph_rewrite.h"
#include "rewrite/weights_check.h"

namespace agq {

namespace {

bool is_plain_rows(const ggml_tensor *t, int type) {
    return t->type == type && t->nb[0] == 4;
}

/// Whether the custom nodes support the product.
bool check_product(const ggml_tensor *node, std::string *error) {
    const ggml_tensor *weights = node->src[0], *x = node->src[1], *ids = node->src[2];
    const bool experts = node->op == host.op_mul_mat_id;
    if (is_plain_rows(x, ggml_type_f32) && is_plain_rows(node, ggml_type_f32) && x->ne[0] == weights->ne[0] &&
        (experts ? is_plain_rows(ids, ggml_type_i32) && x->ne[3] == 1 : weights->ne[2] == 1)) {
        return true;
    }
    *error = describe(weights) + " is used in a product that the plugin does not support; convert it to another type";
    return false;
}

/// Whether `x` is one token whose rows are quantized alike for all experts.
bool is_one_token(const ggml_tensor *x, const ggml_tensor *ids, const tensor_attributes &attributes) {
    const auto as_first = [&](const auto &a) { return a == attributes[0] || a->same_activations(*attributes[0]); };
    return ids->ne[1] == 1 && ids->ne[0] <= activation_set::most_experts && (x->ne[1] == 1 || x->ne[1] == ids->ne[0]) &&
           std::all_of(attributes.begin(), attributes.end(), as_first);
}

/// Whether node j may be computed at the place of node i: nothing from there on uses the memory of its result.
bool is_free_before(ggml_tensor **nodes, int i, int j) {
    const ggml_tensor *result = nodes[j];
    const auto in_the_way = [result](const ggml_tensor *t) { return t && t->data && shares_memory(t, result); };
    return std::none_of(nodes + i, nodes + j, [&](const ggml_tensor *node) {
        return in_the_way(node) || std::any_of(std::begin(node->src), std::end(node->src), in_the_way);
    });
}

}  // namespace

attention_job &graph_rewriter::new_attention() {
    attention_job &job = attentions_.emplace_back();
    job.kern = attention_;
    job.any_length = any_length_;
    return job;
}

void graph_rewriter::add_attention(ggml_tensor *node, attention_job *job) {
    job->memory = &scratch_;
    job->partial = &partial_;
    thread_bytes_ = std::max(thread_bytes_, attention_bytes(*job));
    ggml_tensor *args[4] = {const_cast<ggml_tensor *>(job->q), const_cast<ggml_tensor *>(job->k),
                            const_cast<ggml_tensor *>(job->v), const_cast<ggml_tensor *>(job->mask)};
    add_custom(node, args, job->mask ? 4 : 3, node::attend, job);
}

void graph_rewriter::add_clock(const std::string &label) {
    clocks_.push_back(label.empty() ? -1 : profile_kind(label));
    ggml_tensor *t =
        host.ggml_custom_4d(context_, ggml_type_f32, 1, 1, 1, 1, nullptr, 0, clock_node, 1, &clocks_.back());
    t->flags = ggml_flag_compute;
    t->data = sink_;
    host.ggml_graph_add_node(graph_, t);
}

void graph_rewriter::add_custom(const ggml_tensor *replaced, ggml_tensor **args, int n_args, const custom_node &node,
                                void *userdata) {
    static constexpr int64_t one_element[4] = {1, 1, 1, 1};
    const int64_t *ne = node.has_output ? replaced->ne : one_element;
    ggml_tensor *t = host.ggml_custom_4d(context_, ggml_type_f32, ne[0], ne[1], ne[2], ne[3], args, n_args, node.run,
                                         ggml_n_tasks_max, userdata);
    t->flags = replaced->flags;
    t->buffer = replaced->buffer;
    t->data = node.has_output ? replaced->data : sink_;
    if (node.has_output) {
        std::copy_n(replaced->nb, 4, t->nb);
        std::memcpy(t->name, replaced->name, sizeof(t->name));
    }
    host.ggml_graph_add_node(graph_, t);
}

bool graph_rewriter::can_share(const activation_set &set, const ggml_tensor *node, int i,
                               const tensor_attributes &attributes) const {
    const ggml_tensor *ids = node->op == host.op_mul_mat_id ? node->src[2] : nullptr;
    const std::vector<uint8_t> *four = mixed_.covers(node, i) ? &mixed_.four() : nullptr;
    const auto same = [](const auto &a, const auto &b) { return a == b || a->same_activations(*b); };
    // Rows from a row source exist only in the set, so every product uses them as they are.
    return set.x == node->src[1] && set.ids == ids && (set.source || set.four == four) &&
           std::equal(attributes.begin(), attributes.end(), set.attributes->begin(), set.attributes->end(), same);
}

activation_set *graph_rewriter::find_or_add_set(ggml_tensor *node, int i, const tensor_attributes *attributes) {
    // Only the latest set is still in the buffer.
    if (!sets_.empty() && can_share(sets_.back(), node, i, *attributes)) return &sets_.back();
    ggml_tensor *ids = node->op == host.op_mul_mat_id ? node->src[2] : nullptr;
    return add_set(node, node->src[1], ids, attributes, nullptr, mixed_.covers(node, i) ? &mixed_.four() : nullptr);
}

activation_set *graph_rewriter::add_set(ggml_tensor *node, ggml_tensor *x, ggml_tensor *ids,
                                        const tensor_attributes *attributes, const row_source *source,
                                        const std::vector<uint8_t> *four) {
    activation_set &set = sets_.emplace_back();
    set.x = x;
    set.ids = ids;
    set.kern = kern_;
    set.attributes = attributes;
    set.buffer = &buffer_;
    set.source = source;
    set.memory = &scratch_;
    thread_bytes_ = std::max(thread_bytes_, set.thread_bytes());
    set.four = four;
    set.one_token = ids && !four && is_one_token(x, ids, *attributes);
    if (activations_.mode == activation_settings::kind::all) set.bits = activations_.bits;
    buffer_.reserve(set.rows(), x->ne[0]);
    ggml_tensor *args[2] = {x, ids};
    if (set.one_token) {
        set.plan_one_token();
    } else if (ids || four) {
        add_custom(node, args, ids ? 2 : 1, node::route, &set);
    } else {
        set.route();
    }
    add_custom(node, args, ids ? 2 : 1, node::quantize, &set);
    if (profiled_ && !source) add_clock("quantize");
    return &set;
}

void graph_rewriter::add_expert_choice(ggml_tensor *node, const expert_choice_match &match) {
    expert_choice &c = expert_choices_.emplace_back();
    static_cast<expert_choice_tensors &>(c) = match;
    if (c.clamped) {
        std::memcpy(&c.least, c.clamped->op_params, sizeof(c.least));
        std::memcpy(&c.greatest, c.clamped->op_params + 1, sizeof(c.greatest));
    }
    ggml_tensor *args[2] = {const_cast<ggml_tensor *>(c.scores), const_cast<ggml_tensor *>(c.values)};
    add_custom(node, args, 2, node::choose_experts, &c);
    if (profiled_) add_clock(c.shares ? "ARGSORT+GET_ROWS+SUM_ROWS+CLAMP+DIV" : "ARGSORT+GET_ROWS");
}

void graph_rewriter::add_expert_sum(ggml_tensor *node, const expert_sum_match &match) {
    expert_sum &s = expert_sums_.emplace_back();
    static_cast<expert_sum_tensors &>(s) = match;
    s.result = node;
    s.kern = kern_->rows;
    ggml_tensor *args[2] = {const_cast<ggml_tensor *>(s.outputs), const_cast<ggml_tensor *>(s.weights)};
    add_custom(node, args, 2, node::add_experts, &s);
    if (profiled_) add_clock(match.bias ? "ADD_ID+MUL+ADD" : "MUL+ADD");
}

bool graph_rewriter::add_fused_source(ggml_tensor *node, const fusion &fused, ggml_tensor **nodes, std::string *error) {
    const ggml_tensor *first = nodes[fused.products[0]];
    const tensor_attributes *attributes = find_attributes(first->src[0], error);
    if (!attributes || !check_product(first, error)) return false;
    ggml_tensor *ids = first->op == host.op_mul_mat_id ? first->src[2] : nullptr;
    ggml_tensor *input = first->src[1];
    const bool quantizes = !ids || input == node || is_one_token(input, ids, *attributes);
    if (quantizes) {
        const bool mixed = std::all_of(fused.products.begin(), fused.products.end(),
                                       [&](int i) { return mixed_.covers(nodes[i], i); });
        add_set(node, input, ids, attributes, &fused.source, mixed ? &mixed_.four() : nullptr);
    } else {
        // Which rows lie together in the set is known when the experts have been chosen.
        source_rows &rows = source_rows_.emplace_back();
        rows.source = &fused.source;
        rows.kern = kern_->rows;
        rows.memory = &scratch_;
        thread_bytes_ = std::max(thread_bytes_, rows.thread_bytes());
        add_custom(node, &input, 1, node::compute_rows, &rows);
    }
    if (profiled_) {
        std::string label;
        for (int i : fused.replaced) label += std::string(host.ggml_op_name(nodes[i]->op)) + '+';
        if (!quantizes) label.pop_back();
        add_clock(quantizes ? label + "quantize" : label);
    }
    return true;
}

bool graph_rewriter::add_product(ggml_tensor **nodes, int n, int i, std::string *error) {
    ggml_tensor *node = nodes[i];
    const tensor_attributes *attributes = find_attributes(node->src[0], error);
    if (!attributes) return false;
    if (!check_product(node, error)) return false;
    product &p = products_.emplace_back();
    p.parts.push_back({node->src[0], attributes, node});
    p.memory = &scratch_;
    p.set = find_or_add_set(node, i, attributes);
    if (fuse_) join_products(nodes, n, i, &p);
    thread_bytes_ = std::max(thread_bytes_, p.thread_bytes());
    ggml_tensor *args[2] = {node->src[1], node->src[0]};
    add_custom(node, args, 2, node::multiply, &p);
    if (profiled_) {
        std::string label = profile_label(node);
        for (size_t part = 1; part < p.parts.size(); ++part) {
            const std::string other = profile_label(p.parts[part].result);
            label += '+' + other.substr(other.find(' ') + 1);
        }
        add_clock(label);
    }
    return true;
}

/// Adds the following products of the same input to `p`, whose node is nodes[i], if their results may be written then.
void graph_rewriter::join_products(ggml_tensor **nodes, int n, int i, product *p) {
    constexpr int farthest = 48;  // nodes between queries and values, with biases, norms and rotations
    for (int j = i + 1; j < n && j <= i + farthest; ++j) {
        role &r = roles_[static_cast<size_t>(j)];
        if (r == role::keep || r == role::fused) continue;
        if (r != role::product) return;
        std::string ignored;  // found again, and reported, when the product is added by itself
        const tensor_attributes *attributes = find_attributes(nodes[j]->src[0], &ignored);
        if (!attributes || !check_product(nodes[j], &ignored) || !can_share(*p->set, nodes[j], j, *attributes)) return;
        if (!is_free_before(nodes, i, j)) continue;
        p->parts.push_back({nodes[j]->src[0], attributes, nodes[j]});
        r = role::joined;
    }
}

void graph_rewriter::add_q8_product(ggml_tensor *node) {
    q8_product &p = q8_products_.emplace_back();
    p.node = node;
    p.kern = kern_->q8;
    p.packed = &q8_tokens_;
    p.memory = &scratch_;
    q8_tokens_.reserve(p.packed_bytes(), 1);
    thread_bytes_ = std::max(thread_bytes_, p.thread_bytes());
    ggml_tensor *args[2] = {node->src[1], node->src[0]};
    add_custom(node, args, 1, node::q8_pack, &p);
    add_custom(node, args, 2, node::q8_multiply, &p);
}

bool graph_rewriter::add_row_lookup(ggml_tensor *node, std::string *error) {
    const ggml_tensor *weights = node->src[0];
    const tensor_attributes *attributes = find_attributes(weights, error);
    if (!attributes) return false;
    if (weights->ne[2] != 1 || !is_plain_rows(node->src[1], ggml_type_i32) || !is_plain_rows(node, ggml_type_f32)) {
        *error = describe(weights) +
                 " is used in a row look-up that the plugin does not support; convert it to another type";
        return false;
    }
    row_lookup &lookup = lookups_.emplace_back();
    lookup.weights = weights;
    lookup.attributes = attributes;
    ggml_tensor *args[2] = {node->src[1], node->src[0]};
    add_custom(node, args, 2, node::look_up_rows, &lookup);
    return true;
}

}  // namespace agq
