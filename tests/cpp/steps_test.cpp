// What is found again in each step of decoding by what the step before found: dropped tokens in the cache, and the
// cells that a token sees. Objects that have seen all steps must agree with new ones.
#include <set>

#include "checks.h"
#include "graph/mask_view.h"
#include "little_memory.h"
#include "nodes/sequence_groups.h"
#include "prune/zero_rows.h"

namespace agq {
host_api host;
}

namespace {

using agq::dropped_cell;
using agq::ggml_tensor;
using agq::key_group;

constexpr int n_layers = 4, most_cells = 96, row_length = 32;
constexpr int kept = n_layers;  // the layer in which a token that is never dropped is missing

/// A cache of one sequence, and the mask of one token.
struct cache {
    std::vector<uint16_t> keys = std::vector<uint16_t>(n_layers * most_cells * row_length, 0);
    std::vector<uint16_t> mask_row = std::vector<uint16_t>(most_cells, agq::hidden_f16);
    std::vector<int> missing_from = std::vector<int>(most_cells, 0);  // layer, by cell
    int n_cells = 32;

    void write(int cell, int layer) {
        missing_from[static_cast<size_t>(cell)] = layer;
        for (int l = 0; l < n_layers; ++l) {
            uint16_t *row = &keys[static_cast<size_t>(l * most_cells + cell) * row_length];
            for (int i = 0; i < row_length; ++i) row[i] = l < layer ? static_cast<uint16_t>(random_int(1, 0x7BFF)) : 0;
        }
    }
    std::vector<agq::key_rows> layers() const {
        std::vector<agq::key_rows> found(n_layers);
        for (size_t l = 0; l < n_layers; ++l) {
            found[l].base = reinterpret_cast<const char *>(&keys[l * most_cells * row_length]);
            found[l].row_stride = found[l].row_bytes = row_length * sizeof(uint16_t);
            found[l].type = agq::ggml_type_f16;
            found[l].row_length = row_length;
            found[l].magnitude = 0x7FFF7FFF7FFF7FFFu;
            found[l].head_words = 4;
        }
        return found;
    }
    ggml_tensor mask() {
        ggml_tensor t = {};
        t.type = agq::ggml_type_f16;
        t.ne[0] = n_cells;
        t.ne[1] = t.ne[2] = t.ne[3] = 1;
        t.nb[0] = sizeof(uint16_t);
        t.nb[1] = t.nb[2] = t.nb[3] = sizeof(uint16_t) * static_cast<size_t>(n_cells);
        t.data = mask_row.data();
        return t;
    }
};

bool same_cells(const std::vector<dropped_cell> &a, const std::vector<dropped_cell> &b) {
    const auto same = [](const dropped_cell &x, const dropped_cell &y) {
        return x.stream == y.stream && x.cell == y.cell && x.first_layer == y.first_layer;
    };
    return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), same);
}

bool same_groups(const std::vector<key_group> &a, const std::vector<key_group> &b) {
    if (a.size() != 1 || b.size() != 1 || a[0].n != b[0].n || a[0].n_tokens != b[0].n_tokens) return false;
    for (int64_t i = 0; i < a[0].n; ++i) {
        if (a[0].cell(i) != b[0].cell(i)) return false;
    }
    return std::memcmp(a[0].mask, b[0].mask, sizeof(uint16_t) * static_cast<size_t>(a[0].n)) == 0;
}

/// Between two steps, the host may do anything to a cell: restore, remove, write it again.
void disturb(cache *c, int cell) {
    switch (random_int(1, 4)) {
        case 1:  // a dropped token comes back, or leaves in a later layer
            if (c->missing_from[static_cast<size_t>(cell)] < kept) {
                c->write(cell, random_int(c->missing_from[static_cast<size_t>(cell)] + 1, kept));
            }
            break;
        case 2:  // a token is dropped that was not
            if (c->missing_from[static_cast<size_t>(cell)] == kept) c->write(cell, random_int(1, kept - 1));
            break;
        case 3:
            c->mask_row[static_cast<size_t>(cell)] = agq::hidden_f16;
            break;
        default:
            c->mask_row[static_cast<size_t>(cell)] = 0;
            break;
    }
}

void test_sequence(bool alibi, bool lacks_memory) {
    cache c;
    agq::zero_row_scanner scanner;
    agq::sequence_groups groups;
    int unchanged = 0, steps = 0;
    const int texts = 3;  // one after another in the same cells, so that what is left of one may mislead the next
    for (int text = 0; text < texts; ++text) {
        std::fill(c.mask_row.begin(), c.mask_row.end(), agq::hidden_f16);
        c.n_cells = 32;
        for (int next = 0; next < most_cells; ++next) {
            const size_t cell = static_cast<size_t>(next);
            if (next >= c.n_cells) c.n_cells += 32;
            c.mask_row[cell] = 0;
            // Each cell once: test_earlier_layer has a token that comes back and is dropped in an earlier layer.
            const std::set<int> cells = {random_int(0, next), random_int(0, next), random_int(0, next)};
            for (const int any : cells) {
                if (next > 20 && any < next && chance(10)) disturb(&c, any);
            }
            for (size_t i = 0; alibi && i <= cell; ++i) {
                if (c.mask_row[i] != agq::hidden_f16) c.mask_row[i] = static_cast<uint16_t>(0x3C00 + next - next / 2);
            }
            const ggml_tensor mask = c.mask();
            std::vector<uint8_t> in_flight(static_cast<size_t>(c.n_cells), 0);
            in_flight[cell] = 1;
            const int32_t own = next;
            const char *row = reinterpret_cast<const char *>(c.mask_row.data());
            const std::vector<agq::key_rows> layers = c.layers();
            if (lacks_memory && chance(3)) {
                with_little_memory(random_int(0, 4), [&] { scanner.scan(layers, &mask, in_flight, 1); });
                with_little_memory(random_int(0, 3), [&] { groups.find(&mask, row, 1, &own); });
                if (chance(2)) {
                    c.write(next, chance(3) ? random_int(1, kept - 1) : kept);
                    continue;
                }
            }
            const auto found = scanner.scan(layers, &mask, in_flight, 1);
            ++steps;
            unchanged += scanner.is_unchanged();
            agq::zero_row_scanner fresh;
            CHECK(same_cells(found, fresh.scan(layers, &mask, in_flight, 1)), "text %d, step %d", text, next);
            agq::sequence_groups fresh_groups;
            CHECK(same_groups(groups.find(&mask, row, 1, &own), fresh_groups.find(&mask, row, 1, &own)),
                  "text %d, step %d", text, next);
            c.write(next, chance(3) ? random_int(1, kept - 1) : kept);
        }
    }
    CHECK(lacks_memory || (unchanged > steps / 4 && unchanged < steps), "%d of %d steps were like the one before",
          unchanged, steps);
}

/// A token that is dropped in an earlier layer than before is found when the turn of its row comes.
void test_earlier_layer() {
    cache c;
    agq::zero_row_scanner scanner;
    int waited = 0;
    for (int next = 0; next < 30; ++next) {
        c.mask_row[static_cast<size_t>(next)] = 0;
        if (next == 10) c.write(5, 1);
        const ggml_tensor mask = c.mask();
        std::vector<uint8_t> in_flight(static_cast<size_t>(c.n_cells), 0);
        in_flight[static_cast<size_t>(next)] = 1;
        const std::vector<dropped_cell> &found = scanner.scan(c.layers(), &mask, in_flight, 1);
        if (next >= 10) waited += found.size() != 1 || found[0].first_layer != 1;
        c.write(next, next == 5 ? 2 : kept);
    }
    CHECK(waited < 8, "%d steps", waited);
}

/// Several tokens, whose masks differ in a few cells that neither the first nor the last token may see: a group sees
/// what any of its tokens sees, and no cell is dropped that no token sees.
void test_many_tokens() {
    cache c;
    constexpr int n_tokens = 40;
    std::vector<uint16_t> rows(static_cast<size_t>(n_tokens) * most_cells, agq::hidden_f16);
    c.n_cells = most_cells;
    std::set<int32_t> seen, dropped;
    const auto show = [&](int token, int cell) {
        rows[static_cast<size_t>(token) * most_cells + static_cast<size_t>(cell)] = 0;
        seen.insert(cell);
    };
    for (int t = 0; t < n_tokens; ++t) {
        show(t, 0);
        show(t, 1);  // each sees what the one before sees, so all are one group
        if (random_int(0, 9) == 0) show(t, random_int(2, most_cells - 1));
    }
    for (int cell = 0; cell < most_cells; ++cell) {
        const int layer = random_int(1, kept);
        c.write(cell, layer);
        if (layer < kept && seen.count(cell)) dropped.insert(cell);
    }
    ggml_tensor mask = c.mask();
    mask.data = rows.data();
    mask.ne[1] = n_tokens;
    mask.nb[2] = mask.nb[3] = mask.nb[1] * n_tokens;
    agq::zero_row_scanner scanner;
    std::set<int32_t> found;
    for (const dropped_cell &d : scanner.scan(c.layers(), &mask, {}, 0)) found.insert(d.cell);
    CHECK(found == dropped, "%zu of %zu dropped cells that one of many tokens sees", found.size(), dropped.size());
    const std::vector<int32_t> own(n_tokens, 1);
    agq::sequence_groups groups;
    const std::vector<key_group> &all =
        groups.find(&mask, reinterpret_cast<const char *>(rows.data()), n_tokens, own.data());
    std::set<int32_t> cells;
    for (int64_t i = 0; all.size() == 1 && i < all[0].n; ++i) cells.insert(static_cast<int32_t>(all[0].cell(i)));
    CHECK(cells == seen, "a group sees %zu of the %zu cells that its tokens see", cells.size(), seen.size());
}

}  // namespace

int main() {
    for (int i = 0; i < 400; ++i) test_sequence(i % 2 == 1, i % 4 > 1);
    test_earlier_layer();
    for (int i = 0; i < 100; ++i) test_many_tokens();
    if (failures == 0) std::printf("ok\n");
    return failures != 0;
}
