// Parses the attribute stream without trusting a byte of it, and dequantizes rows for GET_ROWS.
#include "format/attributes.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

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

/// CRC-32 of ISO 3309, the one of zlib.
uint32_t crc32(const std::vector<uint8_t> &bytes) {
    static const std::array<uint32_t, 256> table = make_crc_table();
    uint32_t c = 0xFFFFFFFFu;
    for (uint8_t b : bytes) c = table[(c ^ b) & 0xFF] ^ (c >> 8);
    return c ^ 0xFFFFFFFFu;
}

/// Bytes [16, 16 + length) of the stream; the caller has checked that the tiles hold them.
std::vector<uint8_t> read_parameters(const tile *tiles, size_t length) {
    std::vector<uint8_t> bytes(length);
    for (size_t i = 0; i < length; i += 16) {
        std::memcpy(&bytes[i], tiles[1 + i / 16].attributes, std::min<size_t>(16, length - i));
    }
    return bytes;
}

uint16_t read_u16(const uint8_t *p) {
    return static_cast<uint16_t>(p[0] | p[1] << 8);
}

/// Checks the list of channels and stores it; `bytes` are n times u16.
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

/// Bytes of the pruning record of which `bytes` is the beginning, of `left` bytes up to the end of the parameters; more
/// than there are if it does not fit.
size_t pruning_bytes(const uint8_t *bytes, size_t left) {
    if (left < pruning_record_bytes || bytes[0] != prune_score_learned) return pruning_record_bytes;
    const size_t fixed = pruning_record_bytes + prune_direction_bytes;
    return left < fixed ? fixed : fixed + read_u16(bytes + pruning_record_bytes + 4);
}

/// Checks the direction of a learned score and stores it: factor, count, zero, and one signed byte for each channel.
bool parse_direction(const uint8_t *bytes, matrix_attributes *result, std::string *error) {
    float factor;
    std::memcpy(&factor, bytes, sizeof(factor));
    const size_t n = read_u16(bytes + 4);
    if (n == 0 || read_u16(bytes + 6) != 0 || !std::isfinite(factor) || factor < 0) {
        *error = "the direction of the pruning record is not valid (" + std::to_string(n) + " channels, factor " +
                 std::to_string(factor) + "): the file is damaged";
        return false;
    }
    for (size_t i = 0; i < n; ++i) {
        result->prune_direction.push_back(factor * static_cast<int8_t>(bytes[prune_direction_bytes + i]));
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
    return bytes[0] != prune_score_learned || parse_direction(bytes + pruning_record_bytes, result, error);
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
    } else if (h.length > stream_bytes - 16) {
        *error = "the parameters are longer than the attribute stream: the file is damaged";
    } else {
        return true;
    }
    return false;
}

/// One 12-bit scale, the upper bits of a binary16 number.
float decode_scale(const tile &t, int half, int row) {
    const uint32_t nibble = half == 0 ? t.scale_lo[row] & 15u : t.scale_lo[row] >> 4;
    const uint32_t bits = static_cast<uint32_t>(t.scale_hi[half][row]) << 8 | nibble << 4;
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    float value;
    if (exponent == 31) {
        value = NAN;  // not a valid scale: the row shows it
    } else if (exponent == 0) {
        value = std::ldexp(static_cast<float>(mantissa), -24);
    } else {
        value = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    }
    return bits & 0x8000 ? -value : value;
}

/// Weights of row r of a panel in one group of columns, before the tensor scale. What is not rotated is exact, so that
/// a weight is rounded once, as in the reference.
void unscaled_group(const matrix_attributes &attributes, const tile &t, int64_t g, int r, float *group) {
    const int half = static_cast<int>(g % 2);
    const float scale = std::ldexp(decode_scale(t, half, r), -attributes.exponents[static_cast<size_t>(g)]);
    for (int i = 0; i < group_columns; ++i) {
        const int in_tile = half * group_columns + i;
        const uint8_t byte = t.codes[in_tile / 8][4 * r + in_tile % 4];
        const int code = in_tile % 8 < 4 ? byte & 15 : byte >> 4;
        group[i] = scale * static_cast<float>(attributes.codebook[code] - code_offset);
    }
    if (attributes.format.rotated) rotate_group(group);
}

}  // namespace

bool matrix_attributes::same_activations(const matrix_attributes &other) const {
    return format.k == other.format.k && header.activation == other.header.activation && exponents == other.exponents &&
           listed == other.listed;
}

attribute_header read_header(const tile *tiles) {
    attribute_header header;
    std::memcpy(&header, tiles[0].attributes, sizeof(header));
    return header;
}

std::shared_ptr<const matrix_attributes> parse_attributes(const tile *tiles, int64_t m, int64_t k, std::string *error) {
    auto result = std::make_shared<matrix_attributes>();
    result->header = read_header(tiles);
    const size_t stream_bytes = static_cast<size_t>(m / panel_rows) * static_cast<size_t>(k / tile_columns) * 16;
    if (!check_header(result->header, stream_bytes, error)) return nullptr;

    const std::vector<uint8_t> bytes = read_parameters(tiles, result->header.length);
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
    const int64_t k = attributes.format.k, tiles_per_panel = k / tile_columns;
    const tile *panel = tiles + row / panel_rows * tiles_per_panel;
    const int r = static_cast<int>(row % panel_rows);
    const int64_t n_listed = attributes.format.n_listed;
    int64_t next_listed = 0, channel = 0;  // walk over the channels that are not listed, ascending
    float group[group_columns];
    for (int64_t column = 0; column < k; ++column) {
        const int in_group = static_cast<int>(column % group_columns);
        if (in_group == 0) {
            unscaled_group(attributes, panel[column / tile_columns], column / group_columns, r, group);
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
