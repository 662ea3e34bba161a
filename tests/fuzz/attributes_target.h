// What the fuzzer and the replay program run: the attribute parser on a matrix made from arbitrary bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "format/attributes.h"

namespace agq_fuzz {

inline void require(bool condition, const char *what) {
    if (condition) return;
    std::fprintf(stderr, "violated: %s\n", what);
    std::abort();
}

inline uint32_t crc32_of(const uint8_t *bytes, size_t n) {
    uint32_t c = 0xFFFFFFFFu;
    for (size_t i = 0; i < n; ++i) {
        c ^= bytes[i];
        for (int bit = 0; bit < 8; ++bit) c = (c & 1) ? 0xEDB88320u ^ (c >> 1) : c >> 1;
    }
    return c ^ 0xFFFFFFFFu;
}

/// Where the attribute stream of a matrix is, byte by byte.
inline std::vector<size_t> attribute_places(size_t m, size_t groups) {
    std::vector<size_t> places;
    for (size_t first = 0; first < m; first += 16) {
        const size_t panel = first * groups * 34, rows = std::min<size_t>(16, m - first);
        for (size_t t = 0; t < groups / 2; ++t) {
            for (size_t i = 0; i < rows; ++i) places.push_back(panel + 68 * rows * t + 3 * rows + i);
        }
        if (groups % 2 == 0) continue;
        for (size_t i = rows + (rows + 1) / 2; i < 2 * rows; ++i)
            places.push_back(panel + 34 * rows * (groups - 1) + i);
    }
    return places;
}

/// Input: byte 0 chooses 1 to 128 rows, byte 1 1 to 32 groups of columns, bit 0 of byte 2 asks for a checksum that fits
/// (which no mutation would hit); the rest is the attribute stream, cut or filled up with zeros. Returns 1 if the
/// matrix was accepted, 0 if it was refused with a reason. Aborts if what was accepted breaks a rule.
inline int parse_attributes_of(const uint8_t *data, size_t size) {
    if (size < 3) return 0;
    const int64_t m = data[0] % 128 + 1, groups = data[1] % 32 + 1, k = groups * agq::group_columns;
    const std::vector<size_t> places = attribute_places(static_cast<size_t>(m), static_cast<size_t>(groups));
    std::vector<uint8_t> stream(places.size(), 0);
    std::copy_n(data + 3, std::min(size - 3, stream.size()), stream.begin());
    if (data[2] & 1 && stream.size() >= 16) {
        uint32_t length;
        std::memcpy(&length, &stream[12], 4);
        if (length <= stream.size() - 16) {
            const uint32_t crc = crc32_of(stream.data() + 16, length);
            std::memcpy(&stream[8], &crc, 4);
        }
    }
    // A heap block of exactly this size: one byte beyond it is an error that the sanitizer sees.
    const size_t n_bytes = static_cast<size_t>(m * groups) * 34;
    require(n_bytes == agq::matrix_bytes(m, k) && places.size() == agq::stream_bytes(m, k), "sizes");
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[n_bytes]);
    for (size_t i = 0; i < n_bytes; ++i) bytes[i] = static_cast<uint8_t>(data[2] ^ (i / 1088));
    for (size_t i = 0; i < places.size(); ++i) bytes[places[i]] = stream[i];
    const agq::tile *tiles = reinterpret_cast<const agq::tile *>(bytes.get());
    std::string error;
    const auto found = agq::parse_attributes(tiles, m, k, &error);
    if (!found) {
        require(!error.empty(), "a refusal has a reason");
        return 0;
    }
    require(found->format.k == k, "columns");
    require(found->format.bits == 8 || found->format.bits == 4, "activation bits");
    require(found->exponents.size() == static_cast<size_t>(k / agq::group_columns), "one exponent per group");
    for (uint8_t e : found->exponents) require(e <= agq::max_exponent, "exponents are in range");
    for (int i = 0; i < 16; ++i) {
        require(found->codebook[i] <= 127 && (i == 0 || found->codebook[i - 1] <= found->codebook[i]), "codebook");
    }
    require(found->header.tensor_scale > 0 && std::isfinite(found->header.tensor_scale), "tensor scale");
    require(std::is_sorted(found->listed_sorted.begin(), found->listed_sorted.end()), "sorted list of channels");
    for (uint16_t channel : found->listed) require(channel < k, "channels are in range");
    std::unique_ptr<float[]> row(new float[static_cast<size_t>(k)]);
    for (int64_t r : {int64_t(0), m / 2, m - 1}) {
        std::fill_n(row.get(), k, std::nanf("17"));
        agq::dequantize_row(*found, tiles, r, row.get());
    }
    if (m % 16 != 0) {
        std::unique_ptr<uint8_t[]> panel(new uint8_t[agq::matrix_bytes(16, k)]);
        agq::expand_last_panel(tiles, m, k, reinterpret_cast<agq::tile *>(panel.get()));
    }
    return 1;
}

}  // namespace agq_fuzz
