// Parses the attribute stream, with every byte checked, and dequantizes rows for GET_ROWS.
#include "format/attributes.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "format/panel.h"
#include "format/rotation.h"

namespace agq {

namespace {

std::array<uint32_t, 256> make_crc_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; ++bit) c = (c & 1) ? 0xEDB88320u ^ (c >> 1) : c >> 1;
        table[i] = c;
    }
    return table;
}

/// CRC-32 of ISO 3309, as in zlib.
uint32_t crc32(const std::vector<uint8_t> &bytes) {
    static const std::array<uint32_t, 256> table = make_crc_table();
    uint32_t c = 0xFFFFFFFFu;
    for (uint8_t b : bytes) c = table[(c ^ b) & 0xFF] ^ (c >> 8);
    return c ^ 0xFFFFFFFFu;
}

/// Walks the attribute stream in file order: calls take(bytes, count) for the attribute bytes of each tile and half
/// tile until it returns false.
template <class function>
void walk_stream(const tile *tiles, int64_t m, int64_t k, const function &take) {
    const uint8_t *at = reinterpret_cast<const uint8_t *>(tiles);
    const int64_t groups = k / group_columns;
    for (int64_t row = 0; row < m; row += panel_rows) {
        const size_t rows = static_cast<size_t>(std::min<int64_t>(panel_rows, m - row));
        for (int64_t g = 0; g + 2 <= groups; g += 2, at += 2 * rows * ggml_block_bytes) {
            if (!take(at + 3 * rows, rows)) return;
        }
        if (groups % 2 == 0) continue;
        if (!take(at + rows + (rows + 1) / 2, rows / 2)) return;
        at += rows * ggml_block_bytes;
    }
}

/// Bytes [begin, begin + length) of the stream; the caller has checked that the matrix holds them.
std::vector<uint8_t> read_stream(const tile *tiles, int64_t m, int64_t k, size_t begin, size_t length) {
    std::vector<uint8_t> bytes;
    bytes.reserve(length);
    walk_stream(tiles, m, k, [&](const uint8_t *part, size_t count) {
        const size_t skipped = std::min(begin, count);
        begin -= skipped;
        const size_t wanted = std::min(count - skipped, length - bytes.size());
        bytes.insert(bytes.end(), part + skipped, part + skipped + wanted);
        return bytes.size() < length;
    });
    return bytes;
}

uint16_t read_u16(const uint8_t *p) {
    return static_cast<uint16_t>(p[0] | p[1] << 8);
}

/// Checks the list of channels and stores it; `bytes` holds n u16 values.
bool parse_order(const uint8_t *bytes, size_t n, int64_t k, matrix_attributes *result, std::string *error) {
    for (size_t i = 0; i < n; ++i) {
        const uint16_t channel = read_u16(bytes + 2 * i);
        if (channel >= k) {
            *error = "channels of the channel order must be below " + std::to_string(k) + ", got " +
                     std::to_string(channel) + ": the file is damaged";
            return false;
        }
        result->listed.push_back(channel);
    }
    result->listed_sorted = result->listed;
    std::sort(result->listed_sorted.begin(), result->listed_sorted.end());
    if (std::adjacent_find(result->listed_sorted.begin(), result->listed_sorted.end()) != result->listed_sorted.end()) {
        *error = "the channel order lists a channel twice: the file is damaged";
        return false;
    }
    return true;
}

/// Size in bytes of the pruning record that begins at `bytes`. `left` is the number of bytes up to the end of the
/// parameters. The result is larger than `left` if the record does not fit.
size_t pruning_bytes(const uint8_t *bytes, size_t left) {
    if (left < pruning_record_bytes) return pruning_record_bytes;
    if (bytes[0] == prune_score_heads) {
        const size_t fixed = pruning_record_bytes + prune_heads_bytes;
        return left < fixed ? fixed : fixed + size_t{prune_head_bytes} * bytes[pruning_record_bytes];
    }
    if (bytes[0] != prune_score_learned) return pruning_record_bytes;
    const size_t fixed = pruning_record_bytes + prune_direction_bytes;
    return left < fixed ? fixed : fixed + read_u16(bytes + pruning_record_bytes + 4);
}

bool read_record_direction(const uint8_t *bytes, matrix_attributes *result, std::string *error) {
    const size_t n = read_u16(bytes + 4);
    if (parse_direction(bytes, prune_direction_bytes + n, &result->prune_direction)) return true;
    float factor;
    std::memcpy(&factor, bytes, sizeof(factor));
    *error = "the direction of the pruning record is not valid (" + std::to_string(n) + " channels, factor " +
             std::to_string(factor) + "): the file is damaged";
    return false;
}

/// Reads the heads behind the fixed part of a record. Their number has been checked against the length of the record.
bool read_record_heads(const uint8_t *bytes, matrix_attributes *result, std::string *error) {
    const int n = bytes[0], tail = bytes[1];
    const bool overlaps = tail != prune_no_overlap;
    if (n < 1 || n > max_prune_heads || read_u16(bytes + 2) != 0 || (overlaps && tail > max_prune_tail)) {
        *error = "the heads of the pruning record are not valid (" + std::to_string(n) + " heads, tail " +
                 std::to_string(tail) + "): the file is damaged";
        return false;
    }
    if (overlaps) result->prune_heads.tail = tail;
    for (int i = 0; i < n; ++i) {
        const uint8_t *at = bytes + prune_heads_bytes + prune_head_bytes * i;
        result->prune_heads.heads.push_back({read_u16(at), read_u16(at + 2)});
    }
    return true;
}

/// Checks the pruning record and stores it.
bool parse_pruning(const uint8_t *bytes, matrix_attributes *result, std::string *error) {
    float threshold;
    std::memcpy(&threshold, bytes + 4, sizeof(threshold));
    if (bytes[0] > max_prune_score || bytes[2] > max_prune_reach || bytes[3] > 1 || !std::isfinite(threshold) ||
        threshold < 0) {
        *error = "the pruning record is not valid (score " + std::to_string(bytes[0]) + ", threshold " +
                 std::to_string(threshold) + "): the file is damaged";
        return false;
    }
    result->prunes = true;
    result->prune_score = bytes[0];
    result->prune_threshold = threshold;
    result->prune_keep = bytes[1];
    result->prune_reach = bytes[2];
    result->prune_reuse = bytes[3] == 1;
    const uint8_t *more = bytes + pruning_record_bytes;
    if (bytes[0] == prune_score_heads) return read_record_heads(more, result, error);
    return bytes[0] != prune_score_learned || read_record_direction(more, result, error);
}

bool check_header(const attribute_header &h, size_t stream_bytes, std::string *error) {
    const int bits = h.activation & 15, granularity = h.activation >> 4;
    if (h.magic != attribute_magic) {
        *error = "the attributes must begin with " + std::to_string(attribute_magic) + ", got " +
                 std::to_string(h.magic) + ": the file is damaged or not AGQ4";
    } else if (h.version != attribute_version) {
        *error = "AGQ4 version must be " + std::to_string(attribute_version) + " for this plugin, got " +
                 std::to_string(h.version) + "; update agq-gguf";
    } else if ((bits != 8 && bits != 4) || granularity > max_activation_scale) {
        *error = "activation mode " + std::to_string(h.activation) + " is not supported; update agq-gguf";
    } else if (h.flags & ~(flag_channel_order | flag_pruning)) {
        *error = "flags " + std::to_string(h.flags) + " are not supported; update agq-gguf";
    } else if (!(h.tensor_scale > 0) || !std::isfinite(h.tensor_scale)) {
        *error = "the tensor scale must be finite and > 0: the file is damaged";
    } else if (h.length > stream_bytes - sizeof(h)) {
        *error = "the parameters are longer than the attribute stream: the file is damaged";
    } else {
        return true;
    }
    return false;
}

/// Decodes one scale from the bits of a binary16.
float decode_scale(unsigned bits) {
    const int exponent = static_cast<int>((bits >> 10) & 31), mantissa = static_cast<int>(bits & 1023);
    float value;
    if (exponent == 31) {
        value = NAN;  // not a valid scale: NaN makes it show in the row
    } else if (exponent == 0) {
        value = std::ldexp(static_cast<float>(mantissa), -24);
    } else {
        value = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    }
    return bits & 0x8000 ? -value : value;
}

/// Weights of row r of a panel in its column group g, before the tensor scale. Without rotation they are exact, so that
/// a weight is rounded once, as in the reference.
void unscaled_group(const matrix_attributes &attributes, const stored_group &stored, int64_t g, int r, float *group) {
    const float scale = std::ldexp(decode_scale(stored.scale_bits(r)), -attributes.exponents[static_cast<size_t>(g)]);
    for (int i = 0; i < group_columns; ++i) {
        group[i] = scale * static_cast<float>(attributes.codebook[stored.code(r, i)] - code_offset);
    }
    if (attributes.format.rotated) rotate_group(group);
}

}  // namespace

bool matrix_attributes::same_activations(const matrix_attributes &other) const {
    return format.k == other.format.k && header.activation == other.header.activation && exponents == other.exponents &&
           listed == other.listed;
}

size_t stream_bytes(int64_t m, int64_t k) {
    const int64_t groups = k / group_columns, last = m % panel_rows;
    return static_cast<size_t>(m / panel_rows * groups * (panel_rows / 2) + groups / 2 * last +
                               groups % 2 * (last / 2));
}

size_t matrix_bytes(int64_t m, int64_t k) {
    return static_cast<size_t>(m) * static_cast<size_t>(k / group_columns) * ggml_block_bytes;
}

bool parse_direction(const uint8_t *bytes, size_t size, std::vector<float> *direction) {
    if (size < prune_direction_bytes) return false;
    float factor;
    std::memcpy(&factor, bytes, sizeof(factor));
    const size_t n = read_u16(bytes + 4);
    const bool good = n > 0 && read_u16(bytes + 6) == 0 && std::isfinite(factor) && factor >= 0;
    if (!good || size != prune_direction_bytes + n) return false;
    direction->clear();
    for (size_t i = 0; i < n; ++i) {
        direction->push_back(factor * static_cast<float>(static_cast<int8_t>(bytes[prune_direction_bytes + i])));
    }
    return true;
}

attribute_header read_header(const tile *tiles, int64_t m, int64_t k) {
    attribute_header header = {};
    uint8_t bytes[sizeof(header)];
    size_t filled = 0;
    walk_stream(tiles, m, k, [&](const uint8_t *part, size_t count) {
        const size_t wanted = std::min(count, sizeof(bytes) - filled);
        std::memcpy(bytes + filled, part, wanted);
        filled += wanted;
        return filled < sizeof(bytes);
    });
    if (filled == sizeof(bytes)) std::memcpy(&header, bytes, sizeof(header));
    return header;
}

void expand_last_panel(const tile *tiles, int64_t m, int64_t k, tile *out) {
    const int rows = static_cast<int>(m % panel_rows), groups = static_cast<int>(k / group_columns);
    const uint8_t *panel = reinterpret_cast<const uint8_t *>(tiles) + matrix_bytes(m - rows, k);
    std::memset(out, 0, static_cast<size_t>(groups) * sizeof(half_tile));
    const auto copy_codes = [rows](const uint8_t *from, int chunks, uint8_t (*to)[64]) {
        for (int c = 0; c < chunks; ++c) std::memcpy(to[c], from + 4 * c * rows, 4 * static_cast<size_t>(rows));
    };
    const size_t n = static_cast<size_t>(rows);
    for (int g = 0; g + 2 <= groups; g += 2, panel += 2 * n * ggml_block_bytes, ++out) {
        std::memcpy(out->scale_hi[0], panel, n);
        std::memcpy(out->scale_hi[1], panel + n, n);
        std::memcpy(out->scale_lo, panel + 2 * n, n);
        copy_codes(panel + 4 * n, 16, out->codes);
    }
    if (groups % 2 == 0) return;
    half_tile *last = reinterpret_cast<half_tile *>(out);
    std::memcpy(last->scale_hi, panel, n);
    std::memcpy(last->scale_lo, panel + n, (n + 1) / 2);
    copy_codes(panel + 2 * n, 8, last->codes);
}

std::shared_ptr<const matrix_attributes> parse_attributes(const tile *tiles, int64_t m, int64_t k, std::string *error) {
    auto result = std::make_shared<matrix_attributes>();
    result->rows = m;
    const size_t stream = stream_bytes(m, k);
    if (stream < sizeof(attribute_header)) {
        *error = "the attribute stream of " + std::to_string(m) + " x " + std::to_string(k) + " has " +
                 std::to_string(stream) + " bytes, at least " + std::to_string(sizeof(attribute_header)) +
                 " are needed: the file is damaged";
        return nullptr;
    }
    result->header = read_header(tiles, m, k);
    if (!check_header(result->header, stream, error)) return nullptr;

    const std::vector<uint8_t> bytes = read_stream(tiles, m, k, sizeof(attribute_header), result->header.length);
    const size_t groups = static_cast<size_t>(k / group_columns), fixed = 16 + groups;
    const bool ordered = result->header.flags & flag_channel_order;
    const bool prunes = result->header.flags & flag_pruning;
    size_t expected = fixed;
    if (ordered && bytes.size() >= fixed + 2) expected = fixed + 2 + size_t{2} * read_u16(&bytes[fixed]);
    const bool order_fits = !ordered || expected >= fixed + 4;
    const size_t record = expected;
    if (prunes) expected += record < bytes.size() ? pruning_bytes(&bytes[record], bytes.size() - record) : 1;
    if (bytes.size() != expected || !order_fits) {
        *error = "the parameters must have " + std::to_string(expected) + " bytes for their content, got " +
                 std::to_string(bytes.size()) + ": the file is damaged";
        return nullptr;
    }
    if (crc32(bytes) != result->header.crc32) {
        *error = "the checksum of the parameters does not match: the file is damaged";
        return nullptr;
    }
    std::copy_n(bytes.begin(), 16, result->codebook);
    if (!std::is_sorted(result->codebook, result->codebook + 16) || result->codebook[15] > 127) {
        *error = "the codebook must be ascending within 0..127: the file is damaged";
        return nullptr;
    }
    result->exponents.assign(bytes.begin() + 16, bytes.begin() + static_cast<std::ptrdiff_t>(fixed));
    if (*std::max_element(result->exponents.begin(), result->exponents.end()) > max_exponent) {
        *error = "refinement exponents must be 0 to " + std::to_string(max_exponent) + ": the file is damaged";
        return nullptr;
    }
    if (ordered && !parse_order(&bytes[fixed + 2], read_u16(&bytes[fixed]), k, result.get(), error)) return nullptr;
    if (prunes && !parse_pruning(&bytes[record], result.get(), error)) return nullptr;

    activation_format &f = result->format;
    f.k = static_cast<int>(k);
    f.bits = result->header.activation & 15;
    f.per_group = (result->header.activation >> 4) != activation_scale_token;
    f.rotated = (result->header.activation >> 4) == activation_scale_rotated;
    f.exponents = result->exponents.data();
    f.n_listed = static_cast<int>(result->listed.size());
    f.listed = f.n_listed ? result->listed.data() : nullptr;
    f.listed_sorted = f.n_listed ? result->listed_sorted.data() : nullptr;
    return result;
}

void dequantize_row(const matrix_attributes &attributes, const tile *tiles, int64_t row, float *out) {
    const int64_t k = attributes.format.k, first = row / panel_rows * panel_rows;
    const uint8_t *panel = reinterpret_cast<const uint8_t *>(tiles) + matrix_bytes(first, k);
    const int rows = static_cast<int>(std::min<int64_t>(panel_rows, attributes.rows - first));
    const int groups = static_cast<int>(k / group_columns), r = static_cast<int>(row - first);
    const int64_t n_listed = attributes.format.n_listed;
    int64_t next_listed = 0, channel = 0;  // walks over the channels that are not listed, in ascending order
    float group[group_columns];
    for (int64_t column = 0; column < k; ++column) {
        const int in_group = static_cast<int>(column % group_columns);
        if (in_group == 0) {
            const int g = static_cast<int>(column / group_columns);
            unscaled_group(attributes, group_of(panel, rows, groups, g), g, r, group);
        }
        int64_t target;
        if (column < n_listed) {
            target = attributes.listed[static_cast<size_t>(column)];
        } else {
            while (next_listed < n_listed && attributes.listed_sorted[static_cast<size_t>(next_listed)] == channel) {
                ++next_listed;
                ++channel;
            }
            target = channel++;
        }
        out[target] = group[in_group] * attributes.header.tensor_scale;
    }
}

}  // namespace agq
