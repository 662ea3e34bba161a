// The scales of a panel's 16 rows, for all x86 kernels. Each scale D has 12 bits, a high byte and a nibble: a binary16
// without its last four bits.
#pragma once

#include <immintrin.h>

#include "format/panel.h"

namespace agq {
namespace {

/// 16 scales as binary16: rows 0..7 and 8..15.
struct half_scales {
    __m128i rows0, rows8;
};

/// From the high bytes of 16 rows, and bytes whose high nibbles are the scales' low bits.
inline half_scales join_scales(const uint8_t *scale_hi, __m128i low) {
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(scale_hi));
    low = _mm_and_si128(low, _mm_set1_epi8(static_cast<char>(0xF0)));
    return {_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)};
}

inline half_scales row_scales(const tile &w, int half) {
    __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(w.scale_lo));
    if (half == 0) low = _mm_slli_epi16(low, 4);
    return join_scales(w.scale_hi[half], low);
}

inline half_scales row_scales(const half_tile &w) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(w.scale_lo));
    return join_scales(w.scale_hi, _mm_unpacklo_epi8(_mm_slli_epi16(pairs, 4), pairs));
}

inline half_scales row_scales(const tile *panel, int groups, int g) {
    return is_alone(groups, g) ? row_scales(last_half(panel, groups)) : row_scales(panel[g / 2], g % 2);
}

}  // namespace
}  // namespace agq
