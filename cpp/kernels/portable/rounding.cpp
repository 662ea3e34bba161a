// The rounding kernels, for all instruction sets: loops over rows that compilers vectorize.
//
// Rows are processed in tiles of `lanes`, so that a group of them stays in the first-level cache; the last tile is
// padded with zeros. Everything but the table is in an anonymous namespace, for the reasons in rows.cpp.
#include <cfloat>
#include <cmath>
#include <cstring>

#include "kernels/isa.h"
#include "kernels/portable/grid_rounding.h"
#include "kernels/portable/unroll.h"

namespace agq {
namespace {

constexpr int columns = 64;
constexpr int lanes = 32;
constexpr float largest_scale = 65024.0f;  // binary16 with its lowest four bits zero

// Scales to try. First, the scale that maps the group's largest weight to an end of the codebook, times each of
// `coarse`. Then the best of these, times each of `fine`. Finally the result, times each of `around`, with the whole
// group rounded for each.
constexpr float coarse[] = {0.68f, 0.76f, 0.84f, 0.92f, 1.0f, 1.08f};
constexpr float fine[] = {0.95f, 0.975f, 1.025f, 1.05f};
constexpr float around[] = {0.88f, 0.94f, 1.0f, 1.06f, 1.12f};

using lane_values = float[lanes];
using tile = float[columns][lanes];
using code_tile = uint8_t[columns][lanes];

struct codebook {
    float values[16];
    float midpoints[15];

    explicit codebook(const float *given) {
        std::memcpy(values, given, sizeof(values));
        for (int i = 0; i < 15; ++i) midpoints[i] = (values[i] + values[i + 1]) / 2;
    }

    /// The value nearest to each number; at a midpoint, the larger value.
    void nearest(const lane_values &x, lane_values &found) const {
        for (int t = 0; t < lanes; ++t) found[t] = values[0];
        for (int i = 0; i < 15; ++i) {
            const float middle = midpoints[i], above = values[i + 1];  // loads here keep compilers from branching
            for (int t = 0; t < lanes; ++t) found[t] = x[t] >= middle ? above : found[t];
        }
    }

    /// The same, and its code.
    void nearest(const lane_values &x, lane_values &found, uint8_t *codes) const {
        int32_t code[lanes] = {};
        for (int i = 0; i < 15; ++i) {
            const float middle = midpoints[i];
            for (int t = 0; t < lanes; ++t) code[t] += x[t] >= middle ? 1 : 0;
        }
        for (int t = 0; t < lanes; ++t) codes[t] = static_cast<uint8_t>(code[t]);
        nearest(x, found);
    }
};

void load(const float *from, int64_t stride, int count, tile &to) {
    for (int j = 0; j < columns; ++j) {
        for (int t = 0; t < lanes; ++t) to[j][t] = t < count ? from[j * stride + t] : 0.0f;
    }
}

template <class element>
void store(const element (&from)[columns][lanes], int64_t stride, int count, element *to) {
    for (int j = 0; j < columns; ++j)
        std::memcpy(to + j * stride, from[j], static_cast<size_t>(count) * sizeof(element));
}

/// Nearest storable scales: 6 bits of mantissa, ties to even, steps of 2^-20 below 2^-14.
void storable(lane_values &x) {
    for (int t = 0; t < lanes; ++t) {
        uint32_t bits;
        std::memcpy(&bits, &x[t], 4);
        bits = (bits + 0xFFFF + (bits >> 17 & 1)) & ~0x1FFFFu;
        float rounded;
        std::memcpy(&rounded, &bits, 4);
        const float small = (x[t] + 12.0f) - 12.0f;  // binary32 between 8 and 16 has this step size
        rounded = x[t] < 0x1p-14f && x[t] > -0x1p-14f ? small : rounded;
        rounded = rounded > largest_scale ? largest_scale : rounded;
        x[t] = rounded < -largest_scale ? -largest_scale : rounded;
    }
}

void invert(const lane_values &x, lane_values &inverse) {
    for (int t = 0; t < lanes; ++t) inverse[t] = x[t] == 0.0f ? 0.0f : 1.0f / x[t];
}

// ---- search

/// Refits the scale for the codes that a trial scale gives, and keeps it if its gain is larger. With the best scale for
/// codes q, the error is sum(h w^2) - sum(h w q)^2 / sum(h q^2).
void try_scale(const codebook &book, const tile &weights, const float *h, int64_t h_stride, const lane_values &scale,
               lane_values &best, lane_values &best_gain) {
    lane_values inverse, product = {}, square = {};
    invert(scale, inverse);
    for (int j = 0; j < columns; ++j) {
        lane_values normal, q;
        for (int t = 0; t < lanes; ++t) normal[t] = weights[j][t] * inverse[t];
        book.nearest(normal, q);
        for (int t = 0; t < lanes; ++t) {
            const float weighted = q[t] * h[h_stride ? j * h_stride + t : j];
            product[t] += weighted * weights[j][t];
            square[t] += weighted * q[t];
        }
    }
    for (int t = 0; t < lanes; ++t) {
        const float refitted = product[t] / (square[t] > FLT_MIN ? square[t] : FLT_MIN);
        const float gain = product[t] * refitted;
        best[t] = gain > best_gain[t] ? refitted : best[t];
        best_gain[t] = gain > best_gain[t] ? gain : best_gain[t];
    }
}

void search_tile(const codebook &book, const tile &weights, const float *h, int64_t h_stride, lane_values &best) {
    lane_values largest = {}, gain = {}, scale;
    for (int j = 0; j < columns; ++j) {
        for (int t = 0; t < lanes; ++t) {
            largest[t] = std::fabs(weights[j][t]) > std::fabs(largest[t]) ? weights[j][t] : largest[t];
        }
    }
    for (int t = 0; t < lanes; ++t) best[t] = 0;
    for (int end = 0; end < 16; end += 15) {
        for (const float factor : coarse) {
            if (book.values[end] == 0.0f) continue;
            for (int t = 0; t < lanes; ++t) scale[t] = largest[t] * (factor / book.values[end]);
            try_scale(book, weights, h, h_stride, scale, best, gain);
        }
    }
    lane_values found;
    std::memcpy(found, best, sizeof(found));
    for (const float factor : fine) {
        for (int t = 0; t < lanes; ++t) scale[t] = found[t] * factor;
        try_scale(book, weights, h, h_stride, scale, best, gain);
    }
    storable(best);
}

void search_scales(const float *values, const float *weights, const float *h, bool h_each, int64_t n, float *scales) {
    const codebook book(values);
    for (int64_t row = 0; row < n; row += lanes) {
        const int count = static_cast<int>(n - row < lanes ? n - row : lanes);
        tile part, costs;
        lane_values best;
        load(weights + row, n, count, part);
        if (h_each) load(h + row, n, count, costs);
        search_tile(book, part, h_each ? costs[0] : h, h_each ? lanes : 0, best);
        std::memcpy(scales + row, best, static_cast<size_t>(count) * sizeof(float));
    }
}

// ---- error feedback

/// Rounds a group with given scales; `rest` becomes (W - Q) / U_jj. Returns the loss of each row in `cost`.
void round_tile(const codebook &book, const float *upper, const lane_values &scale, tile &rest, code_tile &codes,
                lane_values &cost) {
    lane_values inverse;
    invert(scale, inverse);
    for (int t = 0; t < lanes; ++t) cost[t] = 0;
    for (int j = 0; j < columns; ++j) {
        const float *row = upper + j * columns;
        const float shrink = 1.0f / row[j];
        lane_values normal, q, error;
        for (int t = 0; t < lanes; ++t) normal[t] = rest[j][t] * inverse[t];
        book.nearest(normal, q, codes[j]);
        for (int t = 0; t < lanes; ++t) {
            error[t] = (rest[j][t] - q[t] * scale[t]) * shrink;
            cost[t] += error[t] * error[t];
            rest[j][t] = error[t];
        }
        for (int i = j + 1; i < columns; ++i) {
            for (int t = 0; t < lanes; ++t) rest[i][t] -= row[i] * error[t];
        }
    }
}

void feed_back(const float *values, const float *upper, const float *weights, int64_t n, uint8_t *codes, float *scales,
               float *errors) {
    const codebook book(values);
    float importance[columns];
    for (int j = 0; j < columns; ++j) importance[j] = 1.0f / (upper[j * columns + j] * upper[j * columns + j]);
    for (int64_t row = 0; row < n; row += lanes) {
        const int count = static_cast<int>(n - row < lanes ? n - row : lanes);
        tile given, rest, best_errors = {};
        code_tile tried, best_codes = {};
        lane_values found, scale, cost, best_cost, best;
        load(weights + row, n, count, given);
        search_tile(book, given, importance, 0, found);
        for (int t = 0; t < lanes; ++t) best[t] = 0;
        for (int t = 0; t < lanes; ++t) best_cost[t] = INFINITY;
        for (const float factor : around) {
            for (int t = 0; t < lanes; ++t) scale[t] = found[t] * factor;
            storable(scale);
            std::memcpy(rest, given, sizeof(rest));
            round_tile(book, upper, scale, rest, tried, cost);
            int32_t better[lanes];
            for (int t = 0; t < lanes; ++t) {
                better[t] = cost[t] < best_cost[t];
                best[t] = better[t] ? scale[t] : best[t];
                best_cost[t] = better[t] ? cost[t] : best_cost[t];
            }
            for (int j = 0; j < columns; ++j) {
                for (int t = 0; t < lanes; ++t) best_errors[j][t] = better[t] ? rest[j][t] : best_errors[j][t];
                for (int t = 0; t < lanes; ++t) best_codes[j][t] = better[t] ? tried[j][t] : best_codes[j][t];
            }
        }
        store(best_errors, n, count, errors + row);
        store(best_codes, n, count, codes + row);
        std::memcpy(scales + row, best, static_cast<size_t>(count) * sizeof(float));
    }
}

// ---- descent

/// Moves the scale to the optimum for the current codes, c S / c H c away, if the nearest storable scale is better than
/// the old one. `product` is H c; `slope` is updated.
void refit(const tile &q, const tile &product, tile &slope, lane_values &scale) {
    lane_values linear = {}, square = {}, wanted;
    for (int j = 0; j < columns; ++j) {
        for (int t = 0; t < lanes; ++t) {
            linear[t] += q[j][t] * slope[j][t];
            square[t] += q[j][t] * product[j][t];
        }
    }
    for (int t = 0; t < lanes; ++t) wanted[t] = scale[t] + (square[t] == 0.0f ? 0.0f : linear[t] / square[t]);
    storable(wanted);
    for (int t = 0; t < lanes; ++t) {
        const float change = wanted[t] - scale[t];
        const float gain = change * (2 * linear[t] - change * square[t]);
        wanted[t] = gain > 0 ? change : 0.0f;
        scale[t] += wanted[t];
    }
    for (int j = 0; j < columns; ++j) {
        for (int t = 0; t < lanes; ++t) slope[j][t] -= wanted[t] * product[j][t];
    }
}

/// Rounds each column in turn to its optimum, Q + S / H_jj. `q`, the values of the codes, is updated.
void visit_columns(const codebook &book, const float *inside, const lane_values &scale, tile &slope, tile &q,
                   code_tile &codes) {
    lane_values inverse;
    invert(scale, inverse);
    for (int j = 0; j < columns; ++j) {
        const float *row = inside + j * columns;
        const float shrink = 1.0f / row[j];
        lane_values normal, value, change;
        for (int t = 0; t < lanes; ++t) normal[t] = q[j][t] + slope[j][t] * shrink * inverse[t];
        book.nearest(normal, value, codes[j]);
        for (int t = 0; t < lanes; ++t) {
            change[t] = (value[t] - q[j][t]) * scale[t];
            q[j][t] = value[t];
        }
        for (int i = j + 1; i < columns; ++i) {  // the columns not visited yet
            for (int t = 0; t < lanes; ++t) slope[i][t] -= row[i] * change[t];
        }
    }
}

void descend(const float *values, const float *inside, const float *slope, int64_t n, uint8_t *codes, float *scales,
             float *change) {
    const codebook book(values);
    for (int64_t row = 0; row < n; row += lanes) {
        const int count = static_cast<int>(n - row < lanes ? n - row : lanes);
        tile rest, q, before, product;
        code_tile found;
        lane_values scale = {};
        load(slope + row, n, count, rest);
        std::memcpy(scale, scales + row, static_cast<size_t>(count) * sizeof(float));
        for (int j = 0; j < columns; ++j) {
            for (int t = 0; t < lanes; ++t) q[j][t] = t < count ? book.values[codes[j * n + row + t]] : 0.0f;
            for (int t = 0; t < lanes; ++t) before[j][t] = q[j][t] * scale[t];
        }
        for (int j = 0; j < columns; ++j) {
            lane_values sum = {};
            for (int i = 0; i < columns; ++i) {
                for (int t = 0; t < lanes; ++t) sum[t] += inside[j * columns + i] * q[i][t];
            }
            std::memcpy(product[j], sum, sizeof(sum));
        }
        refit(q, product, rest, scale);
        visit_columns(book, inside, scale, rest, q, found);
        for (int j = 0; j < columns; ++j) {
            for (int t = 0; t < lanes; ++t) before[j][t] = q[j][t] * scale[t] - before[j][t];
        }
        store(before, n, count, change + row);
        store(found, n, count, codes + row);
        std::memcpy(scales + row, scale, static_cast<size_t>(count) * sizeof(float));
    }
}

// ---- between groups

constexpr int64_t ahead = 64;  // rows of `left` that are asked for before they are needed: each is in another page

/// Asks for 64 numbers.
AGQ_INLINE void fetch(const float *from) {
#if defined(__GNUC__)
    for (int j = 0; j < columns; j += 16) __builtin_prefetch(from + j);
#else
    static_cast<void>(from);
#endif
}

/// Four rows of `left` at once, so that a sum is loaded and stored once for them.
template <int width>
void subtract_four(const float *left, int64_t stride, const float (&right)[4][width], float (&sums)[columns][width]) {
    for (int j = 0; j < columns; ++j) {
        const float a = left[j], b = left[stride + j], c = left[2 * stride + j], d = left[3 * stride + j];
        AGQ_ROLLED
        for (int t = 0; t < width; ++t) {
            sums[j][t] = (((sums[j][t] - a * right[0][t]) - b * right[1][t]) - c * right[2][t]) - d * right[3][t];
        }
    }
}

/// For `count` rows, at most `width`.
template <int width>
void subtract_tile(const float *left, int64_t stride, const float *right, int64_t k, int64_t n, int count, float *out) {
    float sums[columns][width], four[4][width] = {};
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    std::memset(sums, 0, sizeof(sums));
    for (int j = 0; j < columns; ++j) std::memcpy(sums[j], out + j * n, bytes);
    for (int64_t i = 0; i < k; i += 4) {
        for (int64_t r = 0; r < 4; ++r) {
            if (i + r + ahead < k) fetch(left + (i + r + ahead) * stride);
            std::memcpy(four[r], right + (i + r) * n, bytes);
        }
        subtract_four(left + i * stride, stride, four, sums);
    }
    for (int j = 0; j < columns; ++j) std::memcpy(out + j * n, sums[j], bytes);
}

void subtract_product(const float *left, int64_t stride, const float *right, int64_t k, int64_t n, float *out) {
    for (int64_t row = 0; row < n; row += lanes) {
        const int count = static_cast<int>(n - row < lanes ? n - row : lanes);
        const auto subtract = count <= lanes / 2 ? subtract_tile<lanes / 2> : subtract_tile<lanes>;
        subtract(left, stride, right + row, k, n, count, out + row);
    }
}

}  // namespace

namespace isa::AGQ_ISA {

const rounding_kernel rounding = {search_scales,    feed_back,         descend,
                                  subtract_product, feed_back_on_grid, descend_on_grid};

}  // namespace isa::AGQ_ISA
}  // namespace agq
