// The rewriting pass. The host's tensors are never changed. Nodes without AGQ4 are passed on unchanged; the others are
// replaced by custom nodes that write to the same memory.
#include "rewrite/graph_rewrite.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "graph/graph_facts.h"
#include "host/profile.h"
#include "host/tensor_rows.h"
#include "nodes/decode_attention.h"

namespace agq {

namespace {

bool is_product(const ggml_tensor *node) {
    return node->op == host.op_mul_mat || node->op == host.op_mul_mat_id;
}

std::string describe(const ggml_tensor *t) {
    return "tensor '" + std::string(t->name, strnlen(t->name, sizeof(t->name))) + "'";
}

bool is_plain_rows(const ggml_tensor *t, int type) {
    return t->type == type && t->nb[0] == 4;
}

/// Whether the weights are a complete tensor in host memory with a valid shape.
bool check_weights(const ggml_tensor *w, std::string *error) {
    if (!is_shape(w->ne[1], w->ne[0]) || w->ne[3] != 1) {
        *error = describe(w) + " has a shape that AGQ4 does not support; convert the model again";
    } else if (w->view_src || !w->data) {
        *error =
            describe(w) + " is a view of an AGQ4 tensor, which the plugin does not support; convert it to another type";
    } else {
        return true;
    }
    return false;
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

/// Whether `kept` was parsed from these weights. The header holds a checksum of the rest, so comparing the headers
/// detects other weights at the same address.
bool is_intact(const ggml_tensor *weights, const tensor_attributes &kept) {
    const int64_t m = weights->ne[1], k = weights->ne[0];
    bool intact = kept.size() == static_cast<size_t>(weights->ne[2]);
    for (size_t i = 0; intact && i < kept.size(); ++i) {
        const tile *matrix = matrix_at(weights->data, static_cast<int64_t>(i), m, k);
        const attribute_header header = read_header(matrix, m, k);
        intact =
            kept[i]->format.k == k && kept[i]->rows == m && std::memcmp(&header, &kept[i]->header, sizeof(header)) == 0;
    }
    return intact;
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
    clocks_.clear();
    thread_bytes_ = 0;
}

bool graph_rewriter::weights_intact() const {
    const auto intact = [](const ggml_tensor *weights, const tensor_attributes &a) { return is_intact(weights, a); };
    const auto all_intact = [&](const product &p) {
        return std::all_of(p.parts.begin(), p.parts.end(),
                           [&](const product::part &part) { return intact(part.weights, *part.attributes); });
    };
    return std::all_of(products_.begin(), products_.end(), all_intact) &&
           std::all_of(lookups_.begin(), lookups_.end(), [&](auto &l) { return intact(l.weights, *l.attributes); });
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
    scratch_.reserve(thread_bytes_, n_threads);
    mixed_.begin_call(n_threads);
    for (activation_set &s : sets_) s.next.store(0, std::memory_order_relaxed);
    for (product &p : products_) p.next.store(0, std::memory_order_relaxed);
    for (q8_product &p : q8_products_) {
        p.next_token.store(0, std::memory_order_relaxed);
        p.next_rows.store(0, std::memory_order_relaxed);
    }
    for (attention_job &a : attentions_) {
        const auto choice = choices.find(a.mask);
        begin_attention(&a, choice == choices.end() ? nullptr : &choice->second, n_threads);
    }
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
    if (fuse_) assign_fusions(nodes, n);
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
        const bool ours =
            was == role::fused || was == role::fused_source || was == role::joined || was == role::product;
        if (profiled_ && !is_empty_op(nodes[i]->op) && !followed && !ours) add_clock(profile_label(nodes[i]));
    }
    return true;
}

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

const tensor_attributes *graph_rewriter::find_attributes(const ggml_tensor *weights, std::string *error) {
    if (!check_weights(weights, error)) return nullptr;
    const int64_t m = weights->ne[1], k = weights->ne[0];
    tensor_attributes &kept = attributes_[weights->data];
    if (is_intact(weights, kept)) return &kept;
    kept.clear();
    for (int64_t i = 0; i < weights->ne[2]; ++i) {
        std::string reason;
        auto a = parse_attributes(matrix_at(weights->data, i, m, k), m, k, &reason);
        if (a && i > 0 && a->format.per_group != kept[0]->format.per_group) {
            reason = "its experts must share one activation scale mode; convert the model again";
            a = nullptr;
        }
        if (!a) {
            *error = describe(weights) + ": " + reason;
            attributes_.erase(weights->data);
            return nullptr;
        }
        kept.push_back(std::move(a));
    }
    return &kept;
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
    if (activations_.mode == activation_settings::kind::all) set.bits = activations_.bits;
    buffer_.reserve(set.rows(), x->ne[0]);
    ggml_tensor *args[2] = {x, ids};
    if (ids || four) {
        add_custom(node, args, ids ? 2 : 1, node::route, &set);
    } else {
        set.route();
    }
    add_custom(node, args, ids ? 2 : 1, node::quantize, &set);
    if (profiled_ && !source) add_clock("quantize");
    return &set;
}

void graph_rewriter::assign_fusions(ggml_tensor **nodes, int n) {
    std::vector<bool> is_product;
    is_product.reserve(roles_.size());
    for (role r : roles_) is_product.push_back(r == role::product);
    const auto same_format = [&](int i, int j) {
        std::string error;  // found again, and reported, when the product is added
        const tensor_attributes *a = find_attributes(nodes[i]->src[0], &error);
        const tensor_attributes *b = find_attributes(nodes[j]->src[0], &error);
        return a && b && (i == j || (*a)[0]->same_activations(*(*b)[0]));
    };
    for (fusion &f : find_fusions(nodes, n, is_product, same_format)) {
        for (int i : f.replaced) roles_[static_cast<size_t>(i)] = role::fused;
        const int last = f.replaced.back();
        roles_[static_cast<size_t>(last)] = role::fused_source;
        fusions_.emplace(last, std::move(f));
    }
}

bool graph_rewriter::add_fused_source(ggml_tensor *node, const fusion &fused, ggml_tensor **nodes, std::string *error) {
    const ggml_tensor *first = nodes[fused.products[0]];
    const tensor_attributes *attributes = find_attributes(first->src[0], error);
    if (!attributes || !check_product(first, error)) return false;
    const bool mixed =
        std::all_of(fused.products.begin(), fused.products.end(), [&](int i) { return mixed_.covers(nodes[i], i); });
    add_set(node, node, nullptr, attributes, &fused.source, mixed ? &mixed_.four() : nullptr);
    if (profiled_) {
        std::string label;
        for (int i : fused.replaced) label += std::string(host.ggml_op_name(nodes[i]->op)) + '+';
        add_clock(label + "quantize");
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
        if (r == role::keep) continue;
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
