// Threads take units of work from a shared counter, so a slow or busy core takes fewer.
#include "nodes/activation_set.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "host/tensor_rows.h"

namespace agq {

namespace {

/// The input row for row `flat` of the product. With experts, the input may have one row per token, shared by all
/// expert slots.
const float *input_row(const activation_set &set, int64_t flat) {
    const char *row;
    if (set.ids) {
        const int64_t slots = set.ids->ne[0];
        row = row_address(set.x, flat % slots % set.x->ne[1], flat / slots, 0);
    } else {
        row = flat_row(set.x, flat);
    }
    return reinterpret_cast<const float *>(row);
}

/// How many tokens of a block a thread quantizes at a time. Blocks of few tokens are divided, or all threads but one
/// would wait. One token alone is not worth what its thread pays for writing to the cache lines of others.
int tokens_at_a_time(int64_t rows, int nr, int nth) {
    const int64_t share = (rows + nth - 1) / nth;
    return static_cast<int>(std::clamp<int64_t>(share, 2, nr));
}

/// What a thread needs for the rows of a block, if it computes them.
size_t row_bytes(const activation_set &set) {
    return set.source ? align_up(static_cast<size_t>(set.kern->nr * set.x->ne[0]) * sizeof(float)) : 0;
}

/// Copies `pieces` pieces of each of `count` tokens into a block of n tokens, from its token `first` on. In both, the
/// first pieces of all tokens come first, then the second ones, and so on. A piece has `size` bytes, a multiple of 4.
void copy_pieces(const void *from, int64_t pieces, int size, int count, void *block, int n, int first) {
    const auto *read = static_cast<const unsigned char *>(from);
    auto *written = static_cast<unsigned char *>(block) + first * size;
    for (int64_t i = 0; i < pieces; ++i) {
        for (int j = 0; j < count * size; j += 4) std::memcpy(written + j, read + j, 4);
        read += count * size;
        written += n * size;
    }
}

/// Quantizes `count` rows, which become the tokens of `block` from its token `first` on. `memory` is room for a block.
void quantize_tokens(const kernel &kern, const activation_format &format, const float *const *rows, int count,
                     const activation_block &block, int first, void *memory) {
    if (count == block.n) return kern.quantize(format, rows, block);
    const int64_t k = format.k, groups = k / group_columns;
    const activation_buffer::parts own = activation_buffer::split(memory, count, k);
    kern.quantize(format, rows, {own.q, own.bias, own.scale, count});
    copy_pieces(own.q, k / kern.kr, kern.kr, count, block.q, block.n, first);
    copy_pieces(own.bias, groups, sizeof(int32_t), count, block.bias, block.n, first);
    copy_pieces(own.scale, format.per_group ? groups : 1, sizeof(float), count, block.scale, block.n, first);
}

}  // namespace

activation_buffer::~activation_buffer() {
    ::operator delete(memory_, std::align_val_t(cache_line));
}

activation_buffer::parts activation_buffer::split(void *memory, int64_t rows, int64_t k) {
    const size_t values = static_cast<size_t>(rows * k), groups = static_cast<size_t>(rows * (k / group_columns));
    auto *q = static_cast<unsigned char *>(memory), *bias = q + align_up(values),
         *scale = bias + align_up(groups * sizeof(int32_t));
    return {reinterpret_cast<int8_t *>(q), reinterpret_cast<int32_t *>(bias), reinterpret_cast<float *>(scale)};
}

size_t activation_buffer::bytes(int64_t rows, int64_t k) {
    const size_t values = static_cast<size_t>(rows * k), groups = static_cast<size_t>(rows * (k / group_columns));
    return align_up(values) + align_up(groups * sizeof(int32_t)) + align_up(groups * sizeof(float));
}

void activation_buffer::reserve(int64_t rows, int64_t k) {
    const size_t wanted = bytes(rows, k);
    if (wanted <= capacity_) return;
    void *fresh = ::operator new(wanted, std::align_val_t(cache_line));
    ::operator delete(memory_, std::align_val_t(cache_line));
    memory_ = static_cast<unsigned char *>(fresh);
    capacity_ = wanted;
}

size_t activation_set::thread_bytes() const {
    return row_bytes(*this) + activation_buffer::bytes(kern->nr, x->ne[0]);
}

int64_t activation_set::rows() const {
    return ids ? ids->ne[0] * ids->ne[1] : x->ne[1] * x->ne[2] * x->ne[3];
}

int64_t activation_set::packed_rows() const {
    return one_token ? x->ne[1] : rows();
}

int64_t activation_set::scale_stride() const {
    const activation_format &f = (*attributes)[0]->format;
    return f.per_group ? f.k / group_columns : 1;
}

activation_buffer::parts activation_set::packed(int64_t first) const {
    const int64_t k = x->ne[0];
    activation_buffer::parts p = buffer->split(rows(), k);
    if (one_token && x->ne[1] == 1) return p;
    p.q += first * k;
    p.bias += first * (k / group_columns);
    p.scale += first * scale_stride();
    return p;
}

void activation_set::plan_one_token() {
    units.clear();
    order.clear();
    for (int64_t i = 0; i < packed_rows(); ++i) units.push_back({0, i, 1, bits});
    for (int64_t i = 0; i < rows(); ++i) order.push_back(i);
}

int activation_set::segments_of_token(segment *found) const {
    int n = 0;
    for (int64_t i = 0; i < rows(); ++i) {
        const int64_t e = expert(i);
        if (e >= 0) found[n++] = {static_cast<int>(e), i, 1, bits};
    }
    return n;
}

void activation_set::route() {
    segments.clear();
    units.clear();
    invalid.clear();
    order.resize(static_cast<size_t>(rows()));
    if (ids) {
        route_to_experts();
    } else {
        route_by_bits();
    }
    for (const segment &s : segments) {
        for (int64_t first = 0; first < s.count; first += kern->nr) {
            units.push_back(
                {s.matrix, s.first + first, static_cast<int>(std::min<int64_t>(kern->nr, s.count - first)), s.bits});
        }
    }
}

/// Rows with 4 bits come after the others, as a separate segment.
void activation_set::route_by_bits() {
    const int64_t total = rows();
    int64_t filled = 0;
    const auto is_four = [&](int64_t i) { return four && (*four)[static_cast<size_t>(i)] != 0; };
    for (const bool wanted : {false, true}) {
        const int64_t first = filled;
        for (int64_t i = 0; i < total; ++i) {
            if (is_four(i) == wanted) order[static_cast<size_t>(filled++)] = i;
        }
        if (filled > first) segments.push_back({0, first, filled - first, wanted ? 4 : bits});
    }
}

int64_t activation_set::expert(int64_t flat) const {
    const int64_t slots = ids->ne[0];
    const char *row = row_address(ids, flat / slots, 0, 0);
    const int64_t e = *reinterpret_cast<const int32_t *>(row + flat % slots * static_cast<int64_t>(ids->nb[0]));
    return e >= 0 && e < static_cast<int64_t>(attributes->size()) ? e : -1;
}

void activation_set::route_to_experts() {
    const int64_t total = rows();
    std::vector<int64_t> begin(attributes->size() + 1, 0);
    for (int64_t i = 0; i < total; ++i) {
        const int64_t e = expert(i);
        if (e < 0) {
            invalid.push_back(i);
        } else {
            ++begin[static_cast<size_t>(e) + 1];
        }
    }
    for (size_t e = 1; e < begin.size(); ++e) {
        begin[e] += begin[e - 1];
        if (begin[e] > begin[e - 1]) {
            segments.push_back({static_cast<int>(e - 1), begin[e - 1], begin[e] - begin[e - 1], bits});
        }
    }
    for (int64_t i = 0; i < total; ++i) {
        const int64_t e = expert(i);
        if (e >= 0) order[static_cast<size_t>(begin[static_cast<size_t>(e)]++)] = i;
    }
}

void route_node(ggml_tensor *, int ith, int, void *userdata) {
    if (ith == 0) static_cast<activation_set *>(userdata)->route();
}

void quantize_node(ggml_tensor *, int ith, int nth, void *userdata) {
    activation_set &set = *static_cast<activation_set *>(userdata);
    const kernel &kern = *set.kern;
    const int64_t k = set.x->ne[0];
    const int step = tokens_at_a_time(set.packed_rows(), kern.nr, nth), parts = (kern.nr + step - 1) / step;
    auto *memory = static_cast<unsigned char *>(set.memory->of(ith));
    auto *computed = reinterpret_cast<float *>(memory);
    const float *rows[64];
    const int64_t n = static_cast<int64_t>(set.units.size()) * parts;
    for (int64_t i; (i = set.next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        const activation_set::unit &u = set.units[static_cast<size_t>(i / parts)];
        const int first = static_cast<int>(i % parts) * step, count = std::min(step, u.count - first);
        activation_format format = (*set.attributes)[static_cast<size_t>(u.matrix)]->format;
        if (u.bits != 0) format.bits = u.bits;
        for (int t = 0; t < count; ++t) {
            const int64_t flat = set.one_token ? u.first : set.order[static_cast<size_t>(u.first + first + t)];
            if (set.source) {
                set.source->compute(*kern.rows, flat, computed + t * k);
                rows[t] = computed + t * k;
            } else {
                rows[t] = input_row(set, flat);
            }
        }
        const activation_buffer::parts packed = set.packed(u.first);
        const activation_block block = {packed.q, packed.bias, packed.scale, u.count};
        if (count > 0) quantize_tokens(kern, format, rows, count, block, first, memory + row_bytes(set));
    }
}

}  // namespace agq
