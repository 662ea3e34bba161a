#include "rewrite/mixed_activations.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "base/thread_value.h"
#include "graph/token_cut.h"
#include "scores/attention_weights.h"
#include "scores/selection.h"

namespace agq {

namespace {

constexpr int64_t min_tokens = 32;  ///< shortest prompt to mix: the speed of shorter ones is limited by reading weights

/// Parses the whole text as a number; returns false if it is not one.
bool read_number(const std::string &text, double *value) {
    char *end = nullptr;
    *value = std::strtod(text.c_str(), &end);
    return !text.empty() && *end == '\0' && std::isfinite(*value);
}

bool read_option(const std::string &text, activation_settings *settings) {
    double number = 0;
    if (text.compare(0, 6, "layer=") == 0) {
        settings->layer = read_number(text.substr(6), &number) ? static_cast<int>(number) : -1;
        return settings->layer >= 0 && settings->layer == number;
    }
    if (text.compare(0, 6, "score=") != 0) return false;
    settings->measure = find_score(text.substr(6));
    return settings->measure && settings->measure->input == score_input::attention;
}

/// The layer of "blk.N.attn_output.weight" and the like; -1 for products that do not take mixed tokens. The paper keeps
/// 8 bits for the inputs of queries, keys and values.
int layer_of_product(const ggml_tensor *weights) {
    int layer = -1, length = 0;
    const std::string name(weights->name, strnlen(weights->name, sizeof(weights->name)));
    if (std::sscanf(name.c_str(), "blk.%d.%n", &layer, &length) != 1 || length == 0) return -1;
    for (const char *part : {"attn_output.weight", "ffn_up.weight", "ffn_gate.weight", "ffn_down.weight"}) {
        if (name.compare(static_cast<size_t>(length), std::string::npos, part) == 0) return layer;
    }
    return -1;
}

}  // namespace

bool parse_activation_settings(const std::string &text, activation_settings *settings, std::string *error) {
    *settings = {};
    if (text.empty() || text == "file") return true;
    if (text == "8" || text == "4") {
        settings->mode = activation_settings::kind::all;
        settings->bits = text == "4" ? 4 : 8;
        return true;
    }
    bool good = text.compare(0, 6, "mixed:") == 0;
    for (size_t begin = 6, end; good && begin <= text.size(); begin = end + 1) {
        end = std::min(text.find(';', begin), text.size());
        const std::string part = text.substr(begin, end - begin);
        if (begin == 6) {
            double share = 0;
            good = read_number(part, &share) && share >= 0 && share <= 1;
            settings->share = static_cast<float>(share);
        } else {
            good = read_option(part, settings);
        }
    }
    settings->mode = activation_settings::kind::mixed;
    if (!good) {
        *error = "AGQ_ACT_BITS must be 8, 4, or mixed:SHARE with a share of 0 to 1, optionally followed by ;layer=N " +
                 ("and ;score=" + score_names(score_input::attention)) + ", got '" + text + "'";
    }
    return good;
}

void mixed_bits::plan(ggml_tensor **nodes, int n) {
    node_ = -1;
    active_ = false;
    if (settings_.mode != activation_settings::kind::mixed) return;
    facts_.read(nodes, n);
    if (!facts_.k_cells || facts_.k_cells->ne[0] < min_tokens) return;
    std::vector<token_dim> dims;
    std::string obstacle = find_gap(facts_);
    tokens_ = facts_.k_cells->ne[0];
    if (!obstacle.empty() || !kern_ || !trace_tokens(facts_, tokens_, &dims, &obstacle)) return;
    if (!find_site(facts_, settings_.layer, &site_).empty()) return;
    const attention_site &site = facts_.sites[static_cast<size_t>(site_)];
    attention_job job;
    if (!plan_weights(site, kern_, &job)) return;
    // What prevents cutting the graph here also prevents telling its tokens apart.
    std::vector<int> crossing;
    if (!find_crossing(facts_, dims, site.last, &crossing).empty() || is_wanted_whole(facts_, dims, site.last)) return;
    node_ = site.first;
    four_.assign(static_cast<size_t>(tokens_), 0);
}

void mixed_bits::begin_call(int n_threads) {
    if (node_ < 0) return;
    std::fill(four_.begin(), four_.end(), uint8_t{0});
    const attention_site &at = facts_.sites[static_cast<size_t>(site_)];
    active_ = read_ubatch(facts_, &ubatch_).empty() && ubatch_.parts.size() == 1 && !ubatch_.parts[0].is_wanted &&
              find_unseen(*settings_.measure, ubatch_.parts[0], at).empty();
    if (!active_) return;
    const ubatch_part &part = ubatch_.parts[0];
    protected_ = ubatch_.wanted;
    if (part.position == 0) protected_[0] = 1;
    const size_t last = std::min(static_cast<size_t>(settings_.measure->protected_last), protected_.size());
    std::fill(protected_.end() - static_cast<std::ptrdiff_t>(last), protected_.end(), uint8_t{1});
    score_tokens &tokens = meter_->tokens;
    tokens.rows.resize(static_cast<size_t>(tokens_));
    for (size_t i = 0; i < tokens.rows.size(); ++i) tokens.rows[i] = static_cast<int32_t>(i);
    tokens.cells = ubatch_.cells[static_cast<size_t>(at.kind)];
    tokens.first_cell = part.views[static_cast<size_t>(at.kind)].first_cell;
    score_source source;
    source.layer = settings_.layer;
    source.site = at;
    meter_->prepare(source, n_threads);
}

bool mixed_bits::covers(const ggml_tensor *product, int i) const {
    const ggml_tensor *x = product->src[1];
    return node_ >= 0 && i > node_ && product->op == host.op_mul_mat && x->ne[1] == tokens_ && x->ne[2] == 1 &&
           x->ne[3] == 1 && layer_of_product(product->src[0]) >= settings_.layer;
}

std::vector<uint8_t> &mixed_bits::last_call() {
    return thread_value<std::vector<uint8_t>, mixed_bits>();
}

void mixed_bits::record() const {
    if (node_ >= 0 && active_) {
        last_call() = four_;
    } else {
        last_call().clear();
    }
}

void measure_importance_node(ggml_tensor *dst, int ith, int nth, void *userdata) {
    mixed_bits &mixed = *static_cast<mixed_bits *>(userdata);
    if (mixed.active_) measure_node(dst, ith, nth, mixed.meter_.get());
}

void choose_bits_node(ggml_tensor *, int ith, int, void *userdata) {
    mixed_bits &mixed = *static_cast<mixed_bits *>(userdata);
    if (ith != 0 || !mixed.active_) return;
    try {
        const std::vector<float> importance = mixed.meter_->result();
        const size_t count = count_of_share(mixed.settings_.share, importance.size());
        for (int32_t t : choose_least(importance, mixed.protected_, count)) {
            mixed.four_[static_cast<size_t>(t)] = 1;
        }
    } catch (const std::bad_alloc &) {
        return;  // all tokens keep 8 bits
    }
}

}  // namespace agq
