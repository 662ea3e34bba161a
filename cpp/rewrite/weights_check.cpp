#include "rewrite/weights_check.h"

#include <algorithm>
#include <cstring>

#include "rewrite/graph_rewrite.h"

namespace agq {

std::string describe(const ggml_tensor *t) {
    return "tensor '" + std::string(t->name, strnlen(t->name, sizeof(t->name))) + "'";
}

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

bool is_intact(const ggml_tensor *weights, const tensor_attributes &kept, int64_t i) {
    if (kept.size() != static_cast<size_t>(weights->ne[2])) return false;
    const int64_t m = weights->ne[1], k = weights->ne[0];
    const matrix_attributes &a = *kept[static_cast<size_t>(i)];
    const attribute_header header = read_header(matrix_at(weights->data, i, m, k), m, k);
    return a.format.k == k && a.rows == m && std::memcmp(&header, &a.header, sizeof(header)) == 0;
}

bool is_intact(const ggml_tensor *weights, const tensor_attributes &kept) {
    for (int64_t i = 0; i < weights->ne[2]; ++i) {
        if (!is_intact(weights, kept, i)) return false;
    }
    return true;
}

/// Looks at the first matrix of each tensor, and at one other: each header costs a cache miss, and there may be
/// thousands of experts. Other weights show in the first, damage to an expert after as many calls as there are experts.
bool graph_rewriter::weights_intact() {
    ++checks_;
    const auto intact = [this](const ggml_tensor *weights, const tensor_attributes &a) {
        return is_intact(weights, a, 0) &&
               (weights->ne[2] == 1 || is_intact(weights, a, static_cast<int64_t>(checks_ % a.size())));
    };
    const auto all_intact = [&](const product &p) {
        return std::all_of(p.parts.begin(), p.parts.end(),
                           [&](const product::part &part) { return intact(part.weights, *part.attributes); });
    };
    return std::all_of(products_.begin(), products_.end(), all_intact) &&
           std::all_of(lookups_.begin(), lookups_.end(), [&](auto &l) { return intact(l.weights, *l.attributes); });
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

}  // namespace agq
