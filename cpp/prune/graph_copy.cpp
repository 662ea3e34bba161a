#include "prune/graph_copy.h"

#include <algorithm>
#include <cstring>

namespace agq {

ggml_tensor *tensor_arena::add() {
    if (n_tensors_ == group * tensors_.size()) tensors_.emplace_back(new ggml_tensor[group]);
    ggml_tensor *fresh = &tensors_[n_tensors_ / group][n_tensors_ % group];
    ++n_tensors_;
    return fresh;
}

ggml_tensor *tensor_arena::custom(ggml_custom_op function, void *userdata, ggml_backend_buffer *buffer) {
    const ggml_custom_params params = {function, ggml_n_tasks_max, userdata};
    ggml_tensor &t = *add();
    t = {};
    t.type = ggml_type_f32;
    t.buffer = buffer;
    std::fill_n(t.ne, 4, 1);
    make_contiguous(&t);
    t.op = host.op_custom;
    t.flags = ggml_flag_compute;
    t.data = sink_;
    std::memcpy(t.op_params, &params, sizeof(params));
    return &t;
}

char *tensor_arena::memory(size_t bytes) {
    constexpr size_t alignment = 64, least_block = size_t{1} << 20;
    const size_t wanted = bytes + alignment;
    if (blocks_.empty() || blocks_.back().size - blocks_.back().used < wanted) {
        block fresh;
        fresh.size = std::max(wanted, least_block);
        fresh.bytes.reset(new char[fresh.size]);
        blocks_.push_back(std::move(fresh));
    }
    block &b = blocks_.back();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(b.bytes.get()) + b.used;
    const size_t padding = (alignment - begin % alignment) % alignment;
    char *result = b.bytes.get() + b.used + padding;
    b.used += padding + bytes;
    return result;
}

void tensor_arena::clear() {
    n_tensors_ = 0;
    if (blocks_.size() > 1) {  // one block will do next time
        size_t total = 0;
        for (const block &b : blocks_) total += b.size;
        blocks_.clear();
        block merged;
        merged.size = total;
        merged.bytes.reset(new char[total]);
        blocks_.push_back(std::move(merged));
    }
    if (!blocks_.empty()) blocks_.back().used = 0;
}

void graph_copy::begin(const graph_facts *facts, const std::vector<token_dim> *dims, int64_t tokens,
                       tensor_arena *arena) {
    facts_ = facts;
    dims_ = dims;
    tokens_ = tokens;
    arena_ = arena;
    current_.assign(facts->tensors.size(), nullptr);
}

ggml_tensor *graph_copy::node(int i, int64_t tokens_now, ggml_tensor *mask, int mask_slot) {
    ggml_tensor *original = facts_->tensors[static_cast<size_t>(i)];
    bool touched = mask != nullptr;
    ggml_tensor *sources[ggml_max_src] = {};
    for (int s = 0; s < ggml_max_src; ++s) {
        if (!original->src[s]) continue;
        sources[s] = current(facts_->source(i, s));
        touched = touched || sources[s] != original->src[s];
    }
    if (!touched) return original;
    ggml_tensor *copy = arena_->copy(original);
    std::copy_n(sources, ggml_max_src, copy->src);
    if (mask) copy->src[mask_slot] = mask;
    const bool moves = tokens_now != tokens_ || is_view_op(original);  // a view shows the replacement
    if (dims_ && moves && (*dims_)[static_cast<size_t>(i)]) {
        shrink(copy, original, (*dims_)[static_cast<size_t>(i)], tokens_, tokens_now);
    }
    replace(i, copy);
    return copy;
}

ggml_tensor *graph_copy::aside(int i, int64_t tokens_now) {
    const ggml_tensor *original = facts_->tensors[static_cast<size_t>(i)];
    ggml_tensor *copy = arena_->copy(original);
    for (int s = 0; s < ggml_max_src; ++s) {
        if (original->src[s]) copy->src[s] = current(facts_->source(i, s));
    }
    if (const token_dim dim = (*dims_)[static_cast<size_t>(i)]) {
        shrink(copy, original, dim, tokens_, tokens_now);
        if (!is_view_op(original)) {
            copy->view_src = nullptr;
            copy->view_offs = 0;
            copy->data = nullptr;
        }
    }
    replace(i, copy);
    return copy;
}

cut_job::gather graph_copy::gather_of(int number, const ggml_tensor *from, ggml_tensor *to, int64_t source_rows,
                                      const std::vector<int32_t> *rows) const {
    const token_dim dim = (*dims_)[static_cast<size_t>(number)];
    cut_job::gather g = {};
    g.from = static_cast<const char *>(from->data);
    g.to = static_cast<char *>(to->data);
    g.bytes = token_bytes(from, dim);
    g.blocks = dim.sections;
    for (int d = dim.dim + 1; d < 4; ++d) g.blocks *= from->ne[d];
    g.source_rows = source_rows;
    g.rows = rows;
    return g;
}

ggml_tensor *graph_copy::with_tokens(int number, int64_t tokens_now) {
    const ggml_tensor *original = facts_->tensors[static_cast<size_t>(number)];
    const token_dim dim = (*dims_)[static_cast<size_t>(number)];
    ggml_tensor *t = arena_->copy(original);
    t->op = host.op_none;
    std::fill_n(t->src, ggml_max_src, nullptr);
    t->view_src = nullptr;
    t->view_offs = 0;
    t->ne[dim.dim] = dim.mult * dim.sections * tokens_now;
    make_contiguous(t);
    t->data = arena_->memory(host.ggml_nbytes(t));
    return t;
}

void shrink(ggml_tensor *copy, const ggml_tensor *original, token_dim dim, int64_t tokens, int64_t tokens_now) {
    if (dim.by_stream) {
        copy->ne[3] = 1;
    } else {
        copy->ne[dim.dim] = dim.mult * tokens_now;
    }
    if (!is_view_op(original)) {
        make_contiguous(copy);
        return;
    }
    // Strides that span all tokens shrink with their number, and so does the part of the offset that consists of such
    // strides.
    const size_t one = original->nb[dim.dim] * static_cast<size_t>(dim.mult);
    const size_t all = one * static_cast<size_t>(tokens), now = one * static_cast<size_t>(tokens_now);
    for (int d = 0; d < 4; ++d) {
        if (d != dim.dim && original->nb[d] >= all) copy->nb[d] = original->nb[d] / all * now;
    }
    const ggml_tensor *source = copy->src[0];
    const size_t offset =
        static_cast<size_t>(static_cast<char *>(original->data) - static_cast<char *>(original->src[0]->data));
    const size_t moved = offset / all * now + offset % all;
    copy->data = static_cast<char *>(source->data) + moved;
    copy->view_src = source->view_src ? source->view_src : const_cast<ggml_tensor *>(source);
    copy->view_offs = (source->view_src ? source->view_offs : 0) + moved;
}

size_t token_bytes(const ggml_tensor *t, token_dim dim) {
    return t->nb[dim.dim] * static_cast<size_t>(dim.mult);
}

void make_contiguous(ggml_tensor *t) {
    const ggml_type_traits *traits = host.ggml_get_type_traits(t->type);
    t->nb[0] = traits->type_size;
    t->nb[1] = traits->type_size * static_cast<size_t>(t->ne[0] / traits->blck_size);
    for (int d = 2; d < 4; ++d) t->nb[d] = t->nb[d - 1] * static_cast<size_t>(t->ne[d - 1]);
}

}  // namespace agq
