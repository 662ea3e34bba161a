#include "prune/zero_rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "base/prefetch.h"
#include "graph/mask_view.h"

namespace agq {

namespace {

constexpr size_t prefetch_distance = 64;  // in rows; each is a separate cache line, and not in the cache
constexpr int64_t max_block = 256;        // elements in the largest block of a stock type

using to_float_fn = void (*)(const void *, float *, int64_t);

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
    int64_t last_read = -1;
    for (int64_t token = mask->ne[1]; token-- > 0 && !left.empty();) {
        const mask_row row(mask, token, stream);
        const mask_row ahead(mask, std::max<int64_t>(token - mask_rows_ahead, 0), stream);
        const int64_t first_cell = of_stream[left.front()].cell, last_cell = of_stream[left.back()].cell;
        prefetch(ahead.at(first_cell));
        prefetch(ahead.at(last_cell));
        // A row like the last one that was read hides all that is left, too.
        if (last_read >= 0 && row.equals(mask_row(mask, last_read, stream), first_cell, last_cell + 1)) continue;
        last_read = token;
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

void watched_rows::clear() {
    filled_.clear();
    zero_.clear();
    before_.clear();
}

void watched_rows::add(const std::vector<key_rows> &layers, int64_t cell, int32_t hint) {
    if (hint < 0) {
        filled_.push_back(layers.back().row(cell, 0));
        return;
    }
    const size_t first = static_cast<size_t>(hint);
    zero_.push_back(layers[first].row(cell, 0));
    if (first > 0) before_.push_back(layers[first - 1].row(cell, 0));
}

/// Nothing in the loops depends on what was read, so the processor waits for many rows at once.
bool watched_rows::are_as_before(const key_rows &form, size_t turn) const {
    constexpr size_t turns = 8;
    const auto all = [&form](const std::vector<const char *> &rows, size_t begin, size_t step, bool zero) {
        bool agree = true;
        for (size_t i = begin; i < rows.size(); i += step) {
            const size_t ahead = i + step * prefetch_distance;
            if (ahead < rows.size()) prefetch(rows[ahead]);
            agree &= form.begins_with_zeros(rows[i]) == zero;
        }
        return agree;
    };
    return all(filled_, 0, 1, false) && all(zero_, 0, 1, true) && all(before_, turn % turns, turns, false);
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

/// The cell that came to those of the last scan, if there is exactly one and the cache is the same: one token was
/// decoded. Else null.
const int32_t *zero_row_scanner::one_step_on(const std::vector<key_rows> &layers) {
    const int32_t *added = nullptr;
    if (layers.size() == last_layers_ && layers[0].base == last_base_ &&
        candidates_.size() == last_candidates_.size() + 1) {
        const auto [before, here] =
            std::mismatch(last_candidates_.begin(), last_candidates_.end(), candidates_.begin());
        if (std::equal(before, last_candidates_.end(), here + 1)) added = &*here;
    }
    last_layers_ = layers.size();
    last_base_ = layers[0].base;
    last_candidates_.assign(candidates_.begin(), candidates_.end());
    return added;
}

/// Whether the candidates, of one token and of one stream, look as the last scan found them.
bool zero_row_scanner::is_as_before(const std::vector<key_rows> &layers, int32_t *hints, int32_t least_layer,
                                    bool was_watching) {
    const int32_t *added = one_step_on(layers);
    if (!added || !was_watching || least_layer != last_least_layer_) return false;
    int32_t &hint = hints[*added];
    if (!layers.back().may_be_zero(*added, 0)) hint = -1;  // it may be left over from an earlier text
    if (hint >= 0) return false;
    watched_.add(layers, *added, -1);
    return watched_.are_as_before(layers[0], turn_);
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

/// The cells to check: for one token, those that it sees.
void zero_row_scanner::list_candidates(const ggml_tensor *mask, int64_t stream, const uint8_t *skipped) {
    const size_t cells = static_cast<size_t>(mask->ne[0]);
    seen_.assign(cells, mask->ne[1] > 1);
    if (mask->ne[1] == 1) mask_row(mask, 0, stream).mark_visible(0, mask->ne[0], seen_.data());
    if (skipped) {
        for (size_t c = 0; c < cells; ++c) seen_[c] = static_cast<uint8_t>(seen_[c] & (skipped[c] == 0));
    }
    list_marked(seen_, &candidates_);
}

const std::vector<dropped_cell> &zero_row_scanner::scan(const std::vector<key_rows> &layers, const ggml_tensor *mask,
                                                        const std::vector<uint8_t> &skip, int32_t least_layer) {
    const int64_t cells = mask->ne[0], streams = mask->ne[3];
    const size_t total = static_cast<size_t>(cells * streams);
    if (streams > 1 && cells != hinted_cells_) hints_.clear();  // the cells are numbered differently now
    hinted_cells_ = cells;
    if (hints_.size() < total) hints_.resize(total, -1);
    const bool one_token = mask->ne[1] == 1 && streams == 1;
    // Until the end of this scan, which may lack memory, there is nothing to go on from.
    const bool was_watching = std::exchange(is_watching_, false);
    ++turn_;
    unchanged_ = false;
    for (int64_t s = 0; s < streams; ++s) {
        list_candidates(mask, s, skip.empty() ? nullptr : &skip[static_cast<size_t>(s * cells)]);
        int32_t *hints = &hints_[static_cast<size_t>(s * cells)];
        if (one_token && is_as_before(layers, hints, least_layer, was_watching)) {
            is_watching_ = unchanged_ = true;
            return found_;
        }
        if (s == 0) found_.clear();
        scan_stream(layers, mask, s, least_layer, hints);
    }
    last_least_layer_ = least_layer;
    watched_.clear();
    if (one_token) {
        for (const int32_t c : candidates_) watched_.add(layers, c, hints_[static_cast<size_t>(c)]);
    }
    is_watching_ = one_token;
    return found_;
}

}  // namespace agq
