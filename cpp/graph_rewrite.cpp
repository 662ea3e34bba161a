// The rewriting pass. The host's tensors are never changed: nodes that do not touch AGQ4 are passed through by address, the others
// are replaced by custom nodes that write to the same memory.
#include "graph_rewrite.h"

#include <algorithm>
#include <cstring>

namespace agq {

namespace {

bool is_product(const ggml_tensor *node) { return node->op == host.op_mul_mat || node->op == host.op_mul_mat_id; }

std::string describe(const ggml_tensor *t) {
    return "tensor '" + std::string(t->name, strnlen(t->name, sizeof(t->name))) + "'";
}

bool is_plain_rows(const ggml_tensor *t, int type) { return t->type == type && t->nb[0] == 4; }

/// Whether the weights are a whole tensor in host memory, in the shape the format demands.
bool check_weights(const ggml_tensor *w, std::string *error) {
    const bool shape = w->ne[0] > 0 && w->ne[0] % tile_columns == 0 && w->ne[1] > 0 && w->ne[1] % panel_rows == 0 &&
                       w->ne[0] <= INT32_MAX && w->ne[3] == 1;
    if (!shape) {
        *error = describe(w) + " has a shape that AGQ4 cannot have; convert the model again";
    } else if (w->view_src || !w->data) {
        *error = describe(w) + " is part of an AGQ4 tensor, which the plugin cannot take apart; convert it to another type";
    } else {
        return true;
    }
    return false;
}

}  // namespace

bool uses_agq4(const ggml_tensor *node) {
    return node->src[0] && node->src[0]->type == ggml_type_id && (is_product(node) || node->op == host.op_get_rows);
}

bool graph_rewriter::fingerprint::operator==(const fingerprint &other) const {
    return std::equal(src, src + 3, other.src) && std::equal(data, data + 4, other.data) &&
           std::equal(ne, ne + 4, other.ne) && std::equal(nb, nb + 3, other.nb) && op == other.op &&
           flags == other.flags && std::memcmp(&header, &other.header, sizeof(header)) == 0;
}

graph_rewriter::fingerprint graph_rewriter::take_fingerprint(const ggml_tensor *node) {
    fingerprint f = {};
    const ggml_tensor *x = node->src[1];
    for (int i = 0; i < 3; ++i) {
        f.src[i] = node->src[i];
        f.data[i] = node->src[i] ? node->src[i]->data : nullptr;
        f.nb[i] = x->nb[i + 1];
    }
    f.data[3] = node->data;
    std::copy_n(x->ne, 4, f.ne);
    f.op = node->op;
    f.flags = node->flags;
    if (node->src[0]->data) f.header = read_header(static_cast<const tile *>(node->src[0]->data));
    return f;
}

graph_rewriter::~graph_rewriter() { clear(); }

void graph_rewriter::clear() {
    if (context_) host.ggml_free(context_);
    context_ = nullptr;
    graph_ = nullptr;
    nodes_.clear();
    replaced_.clear();
    fingerprints_.clear();
    sets_.clear();
    products_.clear();
    lookups_.clear();
}

bool graph_rewriter::is_repeated(ggml_tensor **nodes, int n) const {
    if (!graph_ || static_cast<size_t>(n) != nodes_.size() || !std::equal(nodes_.begin(), nodes_.end(), nodes)) return false;
    size_t next = 0;
    for (int i = 0; i < n; ++i) {
        if (!uses_agq4(nodes[i])) continue;
        if (next == replaced_.size() || replaced_[next] != i || !(take_fingerprint(nodes[i]) == fingerprints_[next])) {
            return false;
        }
        ++next;
    }
    return next == replaced_.size();
}

ggml_cgraph *graph_rewriter::rewrite(ggml_cgraph *graph, std::string *error) {
    ggml_tensor **nodes = host.ggml_graph_nodes(graph);
    const int n = host.ggml_graph_n_nodes(graph);
    if (std::none_of(nodes, nodes + n, uses_agq4)) return graph;
    if (!is_repeated(nodes, n)) {
        clear();
        if (!build(nodes, n, error)) {
            clear();
            return nullptr;
        }
    }
    for (activation_set &s : sets_) s.next.store(0, std::memory_order_relaxed);
    for (product &p : products_) p.next.store(0, std::memory_order_relaxed);
    return graph_;
}

bool graph_rewriter::build(ggml_tensor **nodes, int n, std::string *error) {
    // A product becomes at most three nodes: routing, quantization, multiplication.
    const size_t n_replaced = static_cast<size_t>(std::count_if(nodes, nodes + n, uses_agq4));
    const size_t n_nodes = static_cast<size_t>(n) + 2 * n_replaced;
    const size_t bytes =
        host.ggml_tensor_overhead() * 3 * n_replaced + host.ggml_graph_overhead_custom(n_nodes, false) + 1024;
    if (memory_.size() < bytes) memory_.resize(bytes);
    context_ = host.ggml_init({memory_.size(), memory_.data(), true});
    if (!context_) throw std::bad_alloc();
    graph_ = host.ggml_new_graph_custom(context_, n_nodes, false);
    nodes_.assign(nodes, nodes + n);
    for (int i = 0; i < n; ++i) {
        if (!uses_agq4(nodes[i])) {
            host.ggml_graph_add_node(graph_, nodes[i]);
            continue;
        }
        if (!(nodes[i]->op == host.op_get_rows ? add_row_lookup(nodes[i], error) : add_product(nodes[i], error))) {
            return false;
        }
        replaced_.push_back(i);
        fingerprints_.push_back(take_fingerprint(nodes[i]));
    }
    return true;
}

void graph_rewriter::add_custom(const ggml_tensor *replaced, ggml_tensor **args, int n_args, ggml_custom_op function,
                                void *userdata) {
    const bool has_output = function == product_node || function == row_lookup_node;
    ggml_tensor *t =
        has_output ? host.ggml_custom_4d(context_, ggml_type_f32, replaced->ne[0], replaced->ne[1], replaced->ne[2],
                                         replaced->ne[3], args, n_args, function, ggml_n_tasks_max, userdata)
                   : host.ggml_custom_4d(context_, ggml_type_f32, 1, 1, 1, 1, args, n_args, function,
                                         ggml_n_tasks_max, userdata);
    t->flags = replaced->flags;
    t->buffer = replaced->buffer;
    t->data = has_output ? replaced->data : sink_;
    if (has_output) {
        std::copy_n(replaced->nb, 4, t->nb);
        std::memcpy(t->name, replaced->name, sizeof(t->name));
    }
    host.ggml_graph_add_node(graph_, t);
}

const tensor_attributes *graph_rewriter::find_attributes(const ggml_tensor *weights, std::string *error) {
    if (!check_weights(weights, error)) return nullptr;
    const tile *tiles = static_cast<const tile *>(weights->data);
    const int64_t matrix_tiles = weights->ne[0] / tile_columns * (weights->ne[1] / panel_rows);
    tensor_attributes &kept = attributes_[weights->data];
    // The header holds a checksum of the rest, so comparing it notices that other weights have come to this address.
    bool valid = kept.size() == static_cast<size_t>(weights->ne[2]);
    for (size_t i = 0; valid && i < kept.size(); ++i) {
        const attribute_header header = read_header(tiles + static_cast<int64_t>(i) * matrix_tiles);
        valid = kept[i]->format.k == weights->ne[0] && std::memcmp(&header, &kept[i]->header, sizeof(header)) == 0;
    }
    if (valid) return &kept;
    kept.clear();
    for (int64_t i = 0; i < weights->ne[2]; ++i) {
        std::string reason;
        auto a = parse_attributes(tiles + i * matrix_tiles, weights->ne[1], weights->ne[0], &reason);
        if (a && i > 0 && a->format.per_group != kept[0]->format.per_group) {
            reason = "its experts differ in how activations are scaled";
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

activation_set *graph_rewriter::find_or_add_set(ggml_tensor *node, const tensor_attributes *attributes) {
    ggml_tensor *x = node->src[1], *ids = node->op == host.op_mul_mat_id ? node->src[2] : nullptr;
    // Only the latest set is still in the buffer.
    if (!sets_.empty()) {
        activation_set &last = sets_.back();
        const auto same = [](const auto &a, const auto &b) { return a == b || a->same_activations(*b); };
        if (last.x == x && last.ids == ids &&
            std::equal(attributes->begin(), attributes->end(), last.attributes->begin(), last.attributes->end(), same)) {
            return &last;
        }
    }
    activation_set &set = sets_.emplace_back();
    set.x = x;
    set.ids = ids;
    set.kern = kern_;
    set.attributes = attributes;
    set.buffer = &buffer_;
    buffer_.reserve(set.rows(), x->ne[0]);
    ggml_tensor *args[2] = {x, ids};
    if (ids) {
        add_custom(node, args, 2, route_node, &set);
    } else {
        set.route();
    }
    add_custom(node, args, ids ? 2 : 1, quantize_node, &set);
    return &set;
}

bool graph_rewriter::add_product(ggml_tensor *node, std::string *error) {
    const ggml_tensor *weights = node->src[0], *x = node->src[1], *ids = node->src[2];
    const tensor_attributes *attributes = find_attributes(weights, error);
    if (!attributes) return false;
    const bool experts = node->op == host.op_mul_mat_id;
    if (!is_plain_rows(x, ggml_type_f32) || !is_plain_rows(node, ggml_type_f32) || x->ne[0] != weights->ne[0] ||
        (experts ? !is_plain_rows(ids, ggml_type_i32) || x->ne[3] != 1 : weights->ne[2] != 1)) {
        *error = describe(weights) + " is used in a product that the plugin does not cover; convert it to another type";
        return false;
    }
    product &p = products_.emplace_back();
    p.weights = weights;
    p.attributes = attributes;
    p.set = find_or_add_set(node, attributes);
    ggml_tensor *args[2] = {node->src[1], node->src[0]};
    add_custom(node, args, 2, product_node, &p);
    return true;
}

bool graph_rewriter::add_row_lookup(ggml_tensor *node, std::string *error) {
    const ggml_tensor *weights = node->src[0];
    const tensor_attributes *attributes = find_attributes(weights, error);
    if (!attributes) return false;
    if (weights->ne[2] != 1 || !is_plain_rows(node->src[1], ggml_type_i32) || !is_plain_rows(node, ggml_type_f32)) {
        *error = describe(weights) + " is used in a row look-up that the plugin does not cover; convert it to another type";
        return false;
    }
    row_lookup &lookup = lookups_.emplace_back();
    lookup.attributes = attributes;
    ggml_tensor *args[2] = {node->src[1], node->src[0]};
    add_custom(node, args, 2, row_lookup_node, &lookup);
    return true;
}

}  // namespace agq
