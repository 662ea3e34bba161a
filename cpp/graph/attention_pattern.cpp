#include "graph/attention_pattern.h"

#include <cstring>

namespace agq {

namespace {

float float_param(const ggml_tensor *node, int i) {
    float value;
    std::memcpy(&value, &node->op_params[i], sizeof(value));
    return value;
}

void match_flash(const ggml_tensor *node, attention_pattern *found) {
    found->scores = node;
    found->mask_slot = 3;
    found->plain = found->is_known = true;
    found->scale = float_param(node, 0);
    found->q = node->src[0];
    found->k = node->src[1];
    found->sinks = node->src[4];
    found->soft_cap = float_param(node, 2);
}

/// Whether the node multiplies by a number and adds nothing.
bool is_factor(const ggml_tensor *node) {
    return std::strcmp(host.ggml_op_desc(node), "SCALE") == 0 && float_param(node, 1) == 0;
}

/// Matches a soft cap of the product: node `capped` is s2 * tanh(s1 * scores). The soft-max multiplies by `scale`.
bool match_soft_cap(const ggml_tensor *capped, const ggml_tensor *scores, float scale, attention_pattern *found) {
    const ggml_tensor *bent = capped->src[0], *scaled = bent ? bent->src[0] : nullptr;
    if (!scaled || scaled->src[0] != scores || !is_factor(capped) || !is_factor(scaled) ||
        std::strcmp(host.ggml_op_desc(bent), "TANH") != 0) {
        return false;
    }
    found->soft_cap = scale * float_param(capped, 0);
    found->scale = float_param(scaled, 0) * found->soft_cap;
    return found->soft_cap > 0;
}

bool match_chain(const ggml_tensor *soft_max, attention_pattern *found) {
    // The product may be followed by a soft cap: up to three nodes of scaling and tanh.
    const ggml_tensor *scores = soft_max->src[0];
    for (int step = 0; step < 4 && scores && scores->op != host.op_mul_mat; ++step) scores = scores->src[0];
    if (!scores || scores->op != host.op_mul_mat) return false;
    found->scores = scores;
    found->mask_slot = 1;
    found->plain = scores == soft_max->src[0];
    found->scale = float_param(soft_max, 0);
    found->is_known = found->plain || match_soft_cap(soft_max->src[0], scores, found->scale, found);
    found->q = scores->src[1];
    found->k = scores->src[0];
    found->sinks = soft_max->src[2];
    return true;
}

}  // namespace

bool match_attention(const ggml_tensor *node, attention_pattern *found) {
    *found = {};
    if (node->op == host.op_flash_attn_ext) {
        match_flash(node, found);
    } else if (node->op != host.op_soft_max || !match_chain(node, found)) {
        return false;
    }
    found->mask = node->src[found->mask_slot];
    found->max_bias = float_param(node, 1);
    return true;
}

const ggml_tensor *soft_max_before(const ggml_tensor *output) {
    const ggml_tensor *weights = output->op == host.op_mul_mat ? output->src[1] : nullptr;
    return weights && weights->op == host.op_soft_max ? weights : nullptr;
}

}  // namespace agq
