#include "scores/score.h"

#include <array>

namespace agq {

namespace {

#define AGQ_ADDRESS(name) &score_##name,
constexpr std::array table = {AGQ_SCORES(AGQ_ADDRESS)};
#undef AGQ_ADDRESS

void append(const score &row, std::string *names) {
    if (!names->empty()) *names += '|';
    *names += row.name;
}

}  // namespace

void measure_node(ggml_tensor *, int ith, int nth, void *userdata) {
    static_cast<score_meter *>(userdata)->run(ith, nth);
}

std::string find_unseen(const score &measure, const ubatch_part &part, const attention_site &site) {
    const sequence_view &view = part.views[static_cast<size_t>(site.kind)];
    if (!measure.looks_at_first || view.first_cell != sequence_view::no_cell) return "";
    return "the sliding window of layer " + std::to_string(site.layer) +
           " hides the first token, at which the score '" + measure.name + "' looks";
}

const score *find_score(const std::string &name) {
    for (const score *row : table) {
        if (name == row->name) return row;
    }
    return nullptr;
}

const score *find_score(int number) {
    for (const score *row : table) {
        if (number >= 0 && number == row->number) return row;
    }
    return nullptr;
}

std::string score_names() {
    std::string names;
    for (const score *row : table) append(*row, &names);
    return names;
}

std::string score_names(score_input input) {
    std::string names;
    for (const score *row : table) {
        if (row->input == input) append(*row, &names);
    }
    return names;
}

}  // namespace agq
