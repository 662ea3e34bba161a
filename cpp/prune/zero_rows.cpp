#include "prune/zero_rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "graph/mask_view.h"

namespace agq {

namespace {

constexpr size_t prefetch_distance = 64;  // in rows; each is a separate cache line, and not in the cache
constexpr int64_t rows_ahead = 16;        // of a mask; each begins in another page
constexpr int64_t max_block = 256;        // elements in the largest block of a stock type

using to_float_fn = void (*)(const void *, float *, int64_t);

void prefetch(const void *address) {
#ifdef __GNUC__
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

/// Whether all 16-bit or 32-bit floats are zero.
template <typename Word>
bool all_zero(const char *bytes, size_t n_bytes) {
    constexpr Word magnitude = static_cast<Word>(~static_cast<Word>(0)) >> 1;
    Word any = 0;
    for (size_t i = 0; i + sizeof(Word) <= n_bytes; i += sizeof(Word)) {
        Word word;
        std::memcpy(&word, bytes + i, sizeof(word));
        any = static_cast<Word>(any | (word & magnitude));
    }
    return any == 0;
}

bool is_16_bit(int type) {
    return type == ggml_type_f16 || type == ggml_type_bf16;
}

/// Removes the cells from `begin` on that no token sees. Reads the mask row by row, as it lies in memory.
void remove_hidden(const ggml_tensor *mask, int64_t stream, size_t begin, std::vector<dropped_cell> *cells) {
    const dropped_cell *of_stream = cells->data() + begin;
    std::vector<uint8_t> seen(cells->size() - begin, 0);
    std::vector<size_t> left(seen.size());  // those that no token has been found to see
    std::iota(left.begin(), left.end(), size_t{0});
    for (int64_t token = mask->ne[1]; token-- > 0 && !left.empty();) {
        const mask_row row(mask, token, stream);
        const mask_row ahead(mask, std::max<int64_t>(token - rows_ahead, 0), stream);
        prefetch(ahead.at(of_stream[left.front()].cell));
        prefetch(ahead.at(of_stream[left.back()].cell));
        size_t n_left = 0;
        for (const size_t i : left) {
            seen[i] = !row.hides(of_stream[i].cell);
            left[n_left] = i;
            n_left += !seen[i];
        }
        left.resize(n_left);
    }
    size_t end = begin;
    for (size_t i = 0; i < seen.size(); ++i) {
        if (seen[i]) (*cells)[end++] = (*cells)[begin + i];
    }
    cells->resize(end);
}

}  // namespace

key_rows key_rows::of(const ggml_tensor *k) {
    key_rows rows;
    const ggml_type_traits *traits = host.ggml_get_type_traits(k->type);
    rows.base = static_cast<const char *>(k->data);
    rows.row_stride = k->nb[1];
    rows.stream_stride = k->nb[3];
    rows.type = k->type;
    rows.row_length = k->ne[0] * k->ne[2];
    rows.row_bytes = static_cast<size_t>(rows.row_length / traits->blck_size) * traits->type_size;
    // A row holds at least one quantized block or 16 floats, so these bytes exist.
    if (is_16_bit(k->type) || k->type == ggml_type_f32) {
        rows.magnitude = k->type == ggml_type_f32 ? 0x7FFFFFFF7FFFFFFFu : 0x7FFF7FFF7FFF7FFFu;
        rows.head_words = static_cast<int>(std::min<size_t>(rows.row_bytes / sizeof(uint64_t), 4));
    } else {
        // Blocks of quantized cache types begin with one or two binary16 numbers: the scale and perhaps the offset. If
        // the first is not zero, some element is not zero. (All supported machines are little endian.)
        rows.magnitude = 0x7FFF;
    }
    return rows;
}

bool key_rows::is_zero(int64_t cell, int64_t stream) const {
    const char *p = row(cell, stream);
    if (!may_be_zero(cell, stream)) return false;
    if (is_16_bit(type)) return all_zero<uint16_t>(p, row_bytes);
    if (type == ggml_type_f32) return all_zero<uint32_t>(p, row_bytes);
    const ggml_type_traits *traits = host.ggml_get_type_traits(type);
    if (!traits->to_float || traits->blck_size > max_block) return false;
    const auto to_float = reinterpret_cast<to_float_fn>(traits->to_float);
    float block[max_block];
    for (size_t offset = 0; offset < row_bytes; offset += traits->type_size) {
        to_float(p + offset, block, traits->blck_size);
        if (std::any_of(block, block + traits->blck_size, [](float x) { return x != 0; })) return false;
    }
    return true;
}

/// A row that is zero in a layer is zero in all later ones, so two rows are enough to verify a hint.
bool zero_row_scanner::is_border(const std::vector<key_rows> &layers, int64_t cell, int64_t stream, int32_t layer) {
    const size_t at = static_cast<size_t>(layer);
    return layer >= 0 && at < layers.size() && layers[at].may_be_zero(cell, stream) &&
           (at == 0 || !layers[at - 1].may_be_zero(cell, stream));
}

/// The first layer in which the row is zero; the row must be zero in the last layer.
int32_t zero_row_scanner::find_border(const std::vector<key_rows> &layers, int64_t cell, int64_t stream) {
    size_t low = 0, high = layers.size() - 1;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (layers[middle].is_zero(cell, stream)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return static_cast<int32_t>(low);
}

/// Rows are far apart, and usually not in the cache.
void zero_row_scanner::prefetch_rows(const std::vector<key_rows> &layers, int64_t cell, int64_t stream, int32_t hint) {
    if (hint < 0 || static_cast<size_t>(hint) >= layers.size()) {
        prefetch(layers.back().row(cell, stream));
        return;
    }
    prefetch(layers[static_cast<size_t>(hint)].row(cell, stream));
    if (hint > 0) prefetch(layers[static_cast<size_t>(hint) - 1].row(cell, stream));
}

/// Whether the cells to check are those of the last scan plus one, in the same cache: one token was decoded.
bool zero_row_scanner::is_one_step_on(const std::vector<key_rows> &layers) {
    bool result = layers.size() == last_layers_ && layers[0].base == last_base_ &&
                  candidates_.size() == last_candidates_.size() + 1;
    if (result) {
        const auto [here, before] =
            std::mismatch(last_candidates_.begin(), last_candidates_.end(), candidates_.begin());
        result = std::equal(here, last_candidates_.end(), before + 1);
    }
    last_layers_ = layers.size();
    last_base_ = layers[0].base;
    last_candidates_.assign(candidates_.begin(), candidates_.end());
    return result;
}

/// Whether the candidates still look as the last scan found them. Reads one row of each, and a second row of one in
/// eight. Nothing in the loops depends on what was read, so the processor waits for many rows at once.
bool zero_row_scanner::is_as_before(const std::vector<key_rows> &layers, int64_t stream, const int32_t *hints) const {
    const int32_t n_layers = static_cast<int32_t>(layers.size());
    // Without a hint (-1), the last layer is read; likewise if a hint is outdated, as that of a new candidate may be.
    const auto rows_of = [&](int32_t hint) -> const key_rows & {
        return layers[std::min(static_cast<uint32_t>(hint), static_cast<uint32_t>(n_layers - 1))];
    };
    const auto has_turn = [&](int32_t cell, int32_t hint) { return hint > 0 && (cell + turn_) % 8 == 0; };
    bool differs = false;
    const size_t n = candidates_.size();
    for (size_t i = 0; i < n; ++i) {
        const int32_t ahead = candidates_[std::min(i + prefetch_distance, n - 1)];
        prefetch(rows_of(hints[ahead]).row(ahead, stream));
        if (has_turn(ahead, hints[ahead])) prefetch(rows_of(hints[ahead] - 1).row(ahead, stream));
        const int32_t cell = candidates_[i], hint = hints[cell];
        differs |= rows_of(hint).may_be_zero(cell, stream) != (hint >= 0) || hint >= n_layers;
    }
    for (const int32_t cell : candidates_) {
        if (has_turn(cell, hints[cell])) differs |= rows_of(hints[cell] - 1).may_be_zero(cell, stream);
    }
    return !differs;
}

/// Checks the candidates.
void zero_row_scanner::scan_stream(const std::vector<key_rows> &layers, const ggml_tensor *mask, int64_t stream,
                                   int32_t least_layer, int32_t *hints) {
    const key_rows &last = layers.back();
    const size_t begin = found_.size();
    for (size_t i = 0; i < candidates_.size(); ++i) {
        if (i + prefetch_distance < candidates_.size()) {
            const int32_t ahead = candidates_[i + prefetch_distance];
            prefetch_rows(layers, ahead, stream, hints[ahead]);
        }
        const int32_t c = candidates_[i];
        int32_t &hint = hints[c];
        if (hint < 0 && !last.may_be_zero(c, stream)) continue;
        if (!is_border(layers, c, stream, hint)) {
            hint = -1;
            if (!last.is_zero(c, stream)) continue;
            hint = find_border(layers, c, stream);
        }
        if (hint >= least_layer) found_.push_back({static_cast<int32_t>(stream), c, hint});
    }
    // The candidates of a single token are the cells that it sees.
    if (mask->ne[1] > 1) remove_hidden(mask, stream, begin, &found_);
}

const std::vector<dropped_cell> &zero_row_scanner::scan(const std::vector<key_rows> &layers, const ggml_tensor *mask,
                                                        const std::vector<uint8_t> &skip, int32_t least_layer) {
    found_.clear();
    const int64_t cells = mask->ne[0], streams = mask->ne[3];
    const size_t total = static_cast<size_t>(cells * streams);
    if (streams > 1 && cells != hinted_cells_) hints_.clear();  // the cells are numbered differently now
    hinted_cells_ = cells;
    if (hints_.size() < total) hints_.resize(total, -1);
    const bool one_token = mask->ne[1] == 1;
    ++turn_;
    for (int64_t s = 0; s < streams; ++s) {
        const uint8_t *skipped = skip.empty() ? nullptr : &skip[static_cast<size_t>(s * cells)];
        const mask_row row(mask, 0, s);  // of the only token, if there is just one
        candidates_.resize(static_cast<size_t>(cells));
        size_t n = 0;
        for (int64_t c = 0; c < cells; ++c) {
            candidates_[n] = static_cast<int32_t>(c);
            n += !(one_token && row.hides(c)) && !(skipped && skipped[c]);
        }
        candidates_.resize(n);
        int32_t *hints = &hints_[static_cast<size_t>(s * cells)];
        if (is_one_step_on(layers) && one_token && streams == 1 && is_as_before(layers, s, hints)) {
            for (const int32_t c : candidates_) {
                if (hints[c] >= least_layer) found_.push_back({static_cast<int32_t>(s), c, hints[c]});
            }
        } else {
            scan_stream(layers, mask, s, least_layer, hints);
        }
    }
    return found_;
}

}  // namespace agq
