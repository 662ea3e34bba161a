// Rounding on a grid, for all instruction sets: loops over rows that compilers vectorize, in tiles of `lanes` rows.
#include "kernels/portable/grid_rounding.h"

#include <cstring>

#include "kernels/isa.h"

namespace agq {
namespace {

constexpr int lanes = 32;
constexpr int64_t most_columns = 256;
constexpr float to_whole = 12582912.0f;  // binary32 from here to the next power of two has steps of 1

using lane_values = float[lanes];

/// Some rows of a block of columns, the last tile padded with zeros.
struct tile {
    const rounding_grid &grid;
    int64_t row;
    int count;

    void load(const float *from, int64_t column, lane_values &to) const {
        for (float &v : to) v = 0.0f;
        std::memcpy(to, from + column * grid.n + row, static_cast<size_t>(count) * sizeof(float));
    }

    template <class element>
    void store(const element (&from)[lanes], int64_t column, element *to) const {
        std::memcpy(to + column * grid.n + row, from, static_cast<size_t>(count) * sizeof(element));
    }

    /// The nearest codes for these weights of a column, ties to even, and what they stand for.
    void round(int64_t column, const lane_values &weights, lane_values &values, uint8_t (&codes)[lanes]) const {
        lane_values step, offset, code;
        load(grid.steps, column, step);
        load(grid.offsets, column, offset);
        const float most = static_cast<float>(grid.most);
        for (int t = 0; t < lanes; ++t) {
            const float inverse = step[t] == 0.0f ? 0.0f : 1.0f / step[t];
            const float exact = (weights[t] - offset[t]) * inverse;
            const float above = exact > 0.0f ? exact : 0.0f;
            const float within = above < most ? above : most;
            code[t] = (within + to_whole) - to_whole;
            values[t] = code[t] * step[t] + offset[t];
        }
        for (int t = 0; t < lanes; ++t) codes[t] = static_cast<uint8_t>(static_cast<int32_t>(code[t]));
    }
};

/// Rounds the columns of a block one after another. `round` gets a tile, the number of a column, the inverse of the
/// matrix's diagonal and what is left of `given` there. It sets what each later column loses, times the matrix.
template <class Round>
void visit_columns(const rounding_grid &grid, const float *matrix, const float *given, const Round &round) {
    for (int64_t row = 0; row < grid.n; row += lanes) {
        const tile part = {grid, row, static_cast<int>(grid.n - row < lanes ? grid.n - row : lanes)};
        float rest[most_columns][lanes];
        for (int64_t j = 0; j < grid.columns; ++j) part.load(given, j, rest[j]);
        for (int64_t j = 0; j < grid.columns; ++j) {
            const float *factors = matrix + j * grid.columns;
            lane_values lost;
            round(part, j, 1.0f / factors[j], rest[j], lost);
            for (int64_t i = j + 1; i < grid.columns; ++i) {
                for (int t = 0; t < lanes; ++t) rest[i][t] -= factors[i] * lost[t];
            }
        }
    }
}

}  // namespace

namespace isa::AGQ_ISA {

void feed_back_on_grid(const rounding_grid &grid, const float *upper, const float *weights, uint8_t *codes,
                       float *errors) {
    const auto round = [=](const tile &part, int64_t j, float shrink, const lane_values &rest, lane_values &error) {
        lane_values values;
        uint8_t found[lanes];
        part.round(j, rest, values, found);
        for (int t = 0; t < lanes; ++t) error[t] = (rest[t] - values[t]) * shrink;
        part.store(found, j, codes);
        part.store(error, j, errors);
    };
    visit_columns(grid, upper, weights, round);
}

void descend_on_grid(const rounding_grid &grid, const float *inside, const float *slope, uint8_t *codes,
                     float *change) {
    const auto round = [=](const tile &part, int64_t j, float shrink, const lane_values &rest, lane_values &moved) {
        lane_values step, offset, before, wanted, values;
        uint8_t found[lanes] = {};
        part.load(part.grid.steps, j, step);
        part.load(part.grid.offsets, j, offset);
        std::memcpy(found, codes + j * part.grid.n + part.row, static_cast<size_t>(part.count));
        for (int t = 0; t < lanes; ++t) {
            before[t] = static_cast<float>(found[t]) * step[t] + offset[t];
            wanted[t] = before[t] + rest[t] * shrink;
        }
        part.round(j, wanted, values, found);
        for (int t = 0; t < lanes; ++t) moved[t] = values[t] - before[t];
        part.store(found, j, codes);
        part.store(moved, j, change);
    };
    visit_columns(grid, inside, slope, round);
}

}  // namespace isa::AGQ_ISA
}  // namespace agq
