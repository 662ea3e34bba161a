#include "prune/early_graph.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace agq {

namespace {

constexpr size_t most_memory = size_t{4} << 30;  ///< of the copied nodes

/// Whether a leaf belongs to the graph, not to the model or its cache.
bool is_of_graph(const ggml_tensor *leaf, const ggml_backend_buffer *buffer) {
    return (leaf->flags & ggml_flag_input) || leaf->buffer == buffer;
}

}  // namespace

std::string early_graph::capture(const graph_facts &facts, const prune_plan &plan) {
    nodes_.clear();
    tensors_.clear();
    weights_.clear();
    weight_data_.clear();
    needed_.clear();
    const size_t n_nodes = static_cast<size_t>(facts.n_nodes);
    const ggml_backend_buffer *buffer = facts.tensors[0]->buffer;
    std::vector<ggml_tensor *> copies(facts.tensors.size(), nullptr);
    size_t constant_bytes = 0;
    for (size_t i = 0; i < facts.tensors.size(); ++i) {
        const ggml_tensor *t = facts.tensors[i];
        if (i < n_nodes || is_of_graph(t, buffer)) {
            copies[i] = &tensors_.emplace_back(*t);
            if (i >= n_nodes && !plan.dims[i]) constant_bytes += (host.ggml_nbytes(t) + 63) / 64 * 64;
        } else {
            weights_.push_back(t);
            weight_data_.push_back(t->data);
        }
    }
    const auto copy_of = [&](ggml_tensor *t) {
        const int number = t ? facts.number(t) : -1;
        return number < 0 || !copies[static_cast<size_t>(number)] ? t : copies[static_cast<size_t>(number)];
    };
    for (ggml_tensor &t : tensors_) {
        for (ggml_tensor *&src : t.src) src = copy_of(src);
        t.view_src = copy_of(t.view_src);
    }
    // Inputs that do not depend on the tokens keep their values.
    constants_.reset(new char[constant_bytes + 64]);
    size_t used = (64 - reinterpret_cast<uintptr_t>(constants_.get()) % 64) % 64;
    for (size_t i = n_nodes; i < facts.tensors.size(); ++i) {
        if (!copies[i] || plan.dims[i]) continue;
        const size_t bytes = host.ggml_nbytes(facts.tensors[i]);
        std::memcpy(constants_.get() + used, facts.tensors[i]->data, bytes);
        copies[i]->data = constants_.get() + used;
        used += (bytes + 63) / 64 * 64;
    }
    for (size_t i = 0; i < n_nodes; ++i) nodes_.push_back(copies[i]);
    facts_.read(nodes_.data(), static_cast<int>(n_nodes));
    plan_ = plan;
    std::string obstacle;
    if (facts_.tensors.size() != facts.tensors.size() || facts_.sites.size() != facts.sites.size()) {
        obstacle = "the host's graph cannot be copied";
    }
    if (obstacle.empty()) obstacle = find_needed(facts);
    stream_ = obstacle.empty() ? stream_of(facts) : 0;
    if (!obstacle.empty()) nodes_.clear();
    return obstacle;
}

/// Finds the nodes of each segment that early tokens need, and gives them memory.
std::string early_graph::find_needed(const graph_facts &facts) {
    records_.clear();
    for (const prune_cut &cut : plan_.cuts) {
        records_.push_back(record_of(facts_, plan_.dims, cut.crossing, records_.empty()));
    }
    needed_.assign(plan_.cuts.size() + 1, {});
    std::set<int> all;
    for (size_t segment = 1; segment < needed_.size(); ++segment) {
        const int begin = plan_.cuts[segment - 1].at + 1;
        const bool is_last = segment == plan_.cuts.size();
        const int end = is_last ? facts_.n_nodes : plan_.cuts[segment].at + 1;
        std::vector<int> open;
        for (int i = begin; i < end; ++i) {
            if (facts_.tensors[static_cast<size_t>(i)]->op == host.op_set_rows) open.push_back(i);
        }
        if (!is_last) {
            for (int number : plan_.cuts[segment].crossing) {
                if (number >= begin && number < end) open.push_back(number);
            }
        }
        std::set<int> needed;
        while (!open.empty()) {
            const int i = open.back();
            open.pop_back();
            if (!needed.insert(i).second) continue;
            for (const ggml_tensor *src : facts_.tensors[static_cast<size_t>(i)]->src) {
                const int number = src ? facts_.number(src) : -1;
                if (number < 0 || number >= facts_.n_nodes) continue;
                const bool is_given = number < begin && plan_.dims[static_cast<size_t>(number)];
                if (is_given) continue;
                const bool is_of_cache = root_of(src)->op == host.op_none;
                if (number < begin && !is_of_cache) return "a node before the cut does not depend on the tokens";
                if (number >= begin) open.push_back(number);
            }
        }
        needed_[segment].assign(needed.begin(), needed.end());
        all.insert(needed.begin(), needed.end());
    }
    // The host's plan of its memory is good for these nodes, too. Only the address changes.
    const char *low = nullptr, *high = nullptr;
    const auto in_compute_memory = [&](const ggml_tensor *t) { return root_of(t)->op != host.op_none; };
    for (int i : all) {
        const ggml_tensor *t = facts.tensors[static_cast<size_t>(i)];
        if (!in_compute_memory(t) || !t->data) continue;
        const char *data = static_cast<const char *>(t->data);
        low = low ? std::min(low, data) : data;
        high = std::max(high, data + host.ggml_nbytes(t));
    }
    const size_t bytes = static_cast<size_t>(high - low);
    if (bytes > most_memory) return "the memory of the host's graph is too large to copy";
    if (memory_size_ < bytes + 64) {
        memory_.reset();
        memory_size_ = 0;
        memory_.reset(new char[bytes + 64]);
        memory_size_ = bytes + 64;
    }
    char *base = memory_.get();
    while ((reinterpret_cast<uintptr_t>(base) ^ reinterpret_cast<uintptr_t>(low)) % 64 != 0) ++base;
    // Nodes that are not needed move as well, because offsets of views are found from both addresses.
    for (ggml_tensor *t : nodes_) {
        if (!in_compute_memory(t) || !t->data) continue;
        t->data = base + (reinterpret_cast<uintptr_t>(t->data) - reinterpret_cast<uintptr_t>(low));
    }
    return "";
}

/// Lets attentions read the keys and values of this stream.
void early_graph::show_stream(int64_t stream) {
    if (stream == stream_) return;
    std::set<ggml_tensor *> views;
    for (const attention_site &site : facts_.sites) {
        const ggml_tensor *output = facts_.tensors[static_cast<size_t>(site.last)];
        const bool is_flash = site.last == site.masked;
        for (const ggml_tensor *t : {site.k, static_cast<const ggml_tensor *>(output->src[is_flash ? 2 : 0])}) {
            // The cache itself is no node of the graph.
            for (int i = facts_.number(t); i >= 0 && i < facts_.n_nodes; i = t ? facts_.number(t) : -1) {
                if (is_view_op(t) && root_of(t)->op == host.op_none)
                    views.insert(facts_.tensors[static_cast<size_t>(i)]);
                t = t->src[0];
            }
        }
    }
    for (ggml_tensor *view : views) {
        view->data = static_cast<char *>(view->data) + (stream - stream_) * static_cast<int64_t>(root_of(view)->nb[2]);
    }
    stream_ = stream;
}

bool early_graph::fits(const graph_facts &now) const {
    if (nodes_.empty() || !now.complete || now.sites.size() != facts_.sites.size()) return false;
    for (size_t s = 0; s < now.sites.size(); ++s) {
        if (now.sites[s].layer != facts_.sites[s].layer) return false;
    }
    size_t n_weights = 0;
    for (size_t i = static_cast<size_t>(now.n_nodes); i < now.tensors.size(); ++i) {
        n_weights += !is_of_graph(now.tensors[i], now.tensors[0]->buffer);
    }
    if (n_weights != weights_.size()) return false;
    for (size_t i = 0; i < weights_.size(); ++i) {
        const int number = now.number(weights_[i]);
        if (number < 0 || now.tensors[static_cast<size_t>(number)]->data != weight_data_[i]) return false;
    }
    return true;
}

bool early_graph::reaches(const early_tokens &tokens) const {
    if (tokens.missing.empty()) return true;
    const int64_t n_cells = facts_.mask->ne[0];
    const int32_t last = tokens.missing.back().place;
    return std::all_of(tokens.cells.begin(), tokens.cells.begin() + last + 1,
                       [n_cells](int32_t cell) { return cell < n_cells; });
}

void early_pass::begin(const early_tokens &tokens) {
    tokens_ = &tokens;
    pools_.clear();
    at_cut_.clear();
    for (const early_token &t : tokens.missing) at_cut_.push_back(const_cast<char *>(t.rows));
}

std::vector<int32_t> early_pass::order_of(const hidden_cells &hidden, int level,
                                          const std::vector<int32_t> &alive) const {
    size_t n_cells = 0;
    for (int32_t cell : tokens_->cells) n_cells = std::max(n_cells, static_cast<size_t>(cell) + 1);
    std::vector<uint8_t> hides(n_cells, 0);
    if (level > 0) {
        for (const dropped_cell &d : hidden.cells(level)) {
            if (static_cast<size_t>(d.cell) < n_cells) hides[static_cast<size_t>(d.cell)] = 1;
        }
    }
    for (int32_t i : alive) hides[static_cast<size_t>(tokens_->missing[static_cast<size_t>(i)].cell)] = 0;
    // Indices into tokens_->cells.
    std::vector<int32_t> order;
    for (size_t i = 0; i < tokens_->cells.size(); ++i) {
        if (!hides[static_cast<size_t>(tokens_->cells[i])]) order.push_back(static_cast<int32_t>(i));
    }
    return order;
}

const float *early_pass::queries(int site, size_t back) const {
    const auto found = queries_.find(site);
    if (found == queries_.end() || back >= n_queries_) return nullptr;
    return &found->second[(n_queries_ - 1 - back) * (found->second.size() / n_queries_)];
}

ggml_status early_graph::run(size_t segment, early_pass *pass, const std::vector<int32_t> &alive,
                             const hidden_cells &hidden, ggml_backend_buffer *buffer, const segment_fn &compute) {
    if (alive.empty()) return status_success;
    pass_ = pass;
    show_stream(pass->tokens_->stream);
    for (ggml_tensor &t : tensors_) t.buffer = buffer;
    orders_.assign(static_cast<size_t>(hidden.levels()), {});
    for (size_t level = 0; level < orders_.size(); ++level) {
        orders_[level] = pass->order_of(hidden, static_cast<int>(level), alive);
    }
    std::vector<char *> next;
    if (segment < plan_.cuts.size()) {
        const size_t bytes = records_[segment].bytes;
        char *pool = pass->pools_.emplace_back(new char[alive.size() * bytes + 1]).get();
        for (size_t i = 0; i < alive.size(); ++i) next.push_back(pool + i * bytes);
    }
    // The last chunk is full, because its last tokens may observe the others.
    const size_t most = static_cast<size_t>(plan_.tokens), odd = alive.size() % most;
    size_t n = 0;
    for (size_t first = 0; first < alive.size(); first += n) {
        n = first == 0 && odd > 0 ? odd : most;
        const std::vector<int32_t> chunk(alive.begin() + static_cast<std::ptrdiff_t>(first),
                                         alive.begin() + static_cast<std::ptrdiff_t>(first + n));
        const std::vector<char *> to(next.begin() + static_cast<std::ptrdiff_t>(next.empty() ? 0 : first),
                                     next.begin() + static_cast<std::ptrdiff_t>(next.empty() ? 0 : first + n));
        const ggml_status status = run_chunk(segment, chunk, to, hidden, buffer, compute);
        if (status != status_success) return status;
    }
    for (size_t i = 0; i < next.size(); ++i) pass->at_cut_[static_cast<size_t>(alive[i])] = next[i];
    return status_success;
}

ggml_status early_graph::run_chunk(size_t segment, const std::vector<int32_t> &chunk, const std::vector<char *> &next,
                                   const hidden_cells &hidden, ggml_backend_buffer *buffer, const segment_fn &compute) {
    arena_.clear();
    lists_.clear();
    pointers_.clear();
    choices_.clear();
    const int64_t n = static_cast<int64_t>(chunk.size());
    copy_.begin(&facts_, &plan_.dims, plan_.tokens, &arena_);
    cut_job before, after;
    add_inputs(segment, chunk, &before);
    pass_->queries_.clear();
    pass_->n_queries_ = std::min<size_t>(chunk.size(), observing_tokens);
    std::deque<cut_job> observers;
    std::vector<ggml_tensor *> nodes = {nullptr};
    std::vector<ggml_tensor *> masks(orders_.size(), nullptr);
    size_t site = 0;
    for (int i : needed_[segment]) {
        while (site < facts_.sites.size() && facts_.sites[site].masked < i) ++site;
        ggml_tensor *mask = nullptr;
        int slot = 0;
        if (site < facts_.sites.size() && facts_.sites[site].masked == i) {
            const size_t level = static_cast<size_t>(hidden.level(static_cast<int>(site)));
            if (!masks[level]) masks[level] = make_mask(chunk, orders_[level], &before);
            mask = masks[level];
            slot = facts_.sites[site].mask_slot;
        }
        for (const head_site &probe : plan_.probes) {
            const attention_site &at = facts_.sites[static_cast<size_t>(probe.site)];
            if (at.first != i) continue;
            const ggml_tensor *q = copy_.current(facts_.number(at.q));
            std::vector<float> &to = pass_->queries_[probe.site];
            const int64_t kept = static_cast<int64_t>(pass_->n_queries_);
            to.resize(static_cast<size_t>(kept * q->ne[0] * q->ne[2]));
            observers.emplace_back().observers.push_back({q, to.data(), n - kept, kept, q->ne[0] * q->ne[2], q->ne[0]});
            nodes.push_back(arena_.custom(cut_node, &observers.back(), buffer));
        }
        nodes.push_back(copy_.node(i, n, mask, slot));
    }
    if (!next.empty()) {
        pack_tokens(records_[segment], copy_, n, pointers_.emplace_back(next), false, &after);
        nodes.push_back(arena_.custom(cut_node, &after, buffer));
    }
    nodes[0] = arena_.custom(cut_node, &before, buffer);
    return compute(nodes.data(), static_cast<int>(nodes.size()), choices_);
}

/// Makes the tensors that cross the cut before the segment.
void early_graph::add_inputs(size_t segment, const std::vector<int32_t> &chunk, cut_job *job) {
    const int64_t n = static_cast<int64_t>(chunk.size());
    const early_tokens &tokens = *pass_->tokens_;
    std::vector<char *> &stored = pointers_.emplace_back(), &at_cut = pointers_.emplace_back();
    std::vector<int32_t> &cells = lists_.emplace_back();
    for (int32_t i : chunk) {
        const early_token &token = tokens.missing[static_cast<size_t>(i)];
        stored.push_back(const_cast<char *>(token.rows));
        at_cut.push_back(pass_->at_cut_[static_cast<size_t>(i)]);
        cells.push_back(token.cell);
    }
    const std::vector<int> &crossing = plan_.cuts[segment - 1].crossing;
    const int64_t n_cells = root_of(facts_.sites[0].cache)->ne[1];  // of a stream
    for (int number : crossing) {
        ggml_tensor *to = copy_.with_tokens(number, n);
        copy_.replace(number, to);
        switch (place_of(facts_, number)) {
            case place_input::position:
                for (size_t i = 0; i < chunk.size(); ++i) {
                    static_cast<int32_t *>(to->data)[i] = tokens.missing[static_cast<size_t>(chunk[i])].position;
                }
                break;
            case place_input::key_cells:
                job->numbers.push_back({static_cast<int64_t *>(to->data), tokens.stream * n_cells, 1, 0, &cells});
                break;
            case place_input::value_cells: {
                const int64_t each = plan_.dims[static_cast<size_t>(number)].mult;
                job->numbers.push_back(
                    {static_cast<int64_t *>(to->data), tokens.stream * n_cells * each, each, n_cells, &cells});
                break;
            }
            case place_input::none:
                break;
        }
    }
    const auto crosses = [&](const token_record::part &part) {
        return std::binary_search(crossing.begin(), crossing.end(), part.number);
    };
    token_record inputs, nodes;
    for (const token_record::part &part : records_[0].parts) {
        if (part.number >= facts_.n_nodes && crosses(part)) inputs.parts.push_back(part);
    }
    for (const token_record::part &part : records_[segment - 1].parts) {
        if (part.number < facts_.n_nodes) nodes.parts.push_back(part);
    }
    pack_tokens(inputs, copy_, n, stored, true, job);
    pack_tokens(nodes, copy_, n, at_cut, true, job);
}

/// A mask in which each token of the chunk sees the tokens of `order` up to itself.
ggml_tensor *early_graph::make_mask(const std::vector<int32_t> &chunk, const std::vector<int32_t> &order,
                                    cut_job *job) {
    const early_tokens &tokens = *pass_->tokens_;
    const ggml_tensor *original = facts_.mask;
    const int64_t n = static_cast<int64_t>(chunk.size());
    std::vector<int32_t> &seen = lists_.emplace_back();
    for (int32_t i : chunk) {
        const int32_t place = tokens.missing[static_cast<size_t>(i)].place;
        seen.push_back(static_cast<int32_t>(std::upper_bound(order.begin(), order.end(), place) - order.begin()));
    }
    std::vector<int32_t> &cells = lists_.emplace_back();
    for (int32_t i = 0; i < seen.back(); ++i) {
        cells.push_back(tokens.cells[static_cast<size_t>(order[static_cast<size_t>(i)])]);
    }
    ggml_tensor *made = copy_.with_tokens(facts_.number(original), n);
    const bool is_f16 = original->type == ggml_type_f16;
    job->ordered_masks.push_back(
        {static_cast<char *>(made->data), made->nb[1], original->ne[0], is_f16, false, &cells, &seen});
    // The same for our own attention, which skips the keys that no token sees. It wants ascending cells.
    std::vector<int32_t> &sorted = lists_.emplace_back(cells);
    std::sort(sorted.begin(), sorted.end());
    if (sorted != cells) return made;
    key_group &choice = choices_[made].emplace_back();
    choice.n_tokens = n;
    choice.cells = sorted.data();
    choice.n = static_cast<int64_t>(sorted.size());
    choice.mask_stride = sorted.size() * original->nb[0];
    char *memory = arena_.memory(choice.mask_stride * static_cast<size_t>(n));
    choice.mask = memory;
    job->ordered_masks.push_back({memory, choice.mask_stride, choice.n, is_f16, true, &sorted, &seen});
    return made;
}

}  // namespace agq
