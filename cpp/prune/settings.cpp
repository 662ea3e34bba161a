#include "prune/settings.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "format/attributes.h"

namespace agq {

namespace {

constexpr int max_layer = 10000;
constexpr size_t shown_length = 200;  ///< characters of a wrong specification that its message repeats

std::vector<std::string> split(const std::string &text, char separator) {
    std::vector<std::string> parts(1);
    for (char c : text) {
        if (c == separator) {
            parts.emplace_back();
        } else if (c != ' ') {
            parts.back() += c;
        }
    }
    return parts;
}

bool parse_number(const std::string &text, double *value) {
    char *end = nullptr;
    *value = std::strtod(text.c_str(), &end);
    return !text.empty() && *end == '\0' && std::isfinite(*value);
}

bool parse_whole(const std::string &text, int least, int most, int *value) {
    double number;
    if (!parse_number(text, &number) || number < least || number > most || number != std::floor(number)) return false;
    *value = static_cast<int>(number);
    return true;
}

/// Parses LAYER:SHARE or LAYER:tTHRESHOLD.
bool parse_stage(const std::string &text, prune_stage *stage) {
    const size_t colon = text.find(':');
    if (colon == std::string::npos || !parse_whole(text.substr(0, colon), 0, max_layer, &stage->layer)) return false;
    std::string value = text.substr(colon + 1);
    stage->rule.by_share = value.empty() || value[0] != 't';
    if (!stage->rule.by_share) value.erase(0, 1);
    double number;
    if (!parse_number(value, &number) || number < 0 || (stage->rule.by_share && number >= 1)) return false;
    stage->rule.value = static_cast<float>(number);
    return true;
}

bool parse_hex(const std::string &text, std::vector<uint8_t> *bytes) {
    const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; };
    for (size_t i = 0; i < text.size(); i += 2) {
        const int high = digit(text[i]), low = i + 1 < text.size() ? digit(text[i + 1]) : -1;
        if (high < 0 || low < 0) return false;
        bytes->push_back(static_cast<uint8_t>(16 * high + low));
    }
    return true;
}

/// Parses LAYER:BYTES, the direction of a learned score for a stage of the list.
bool parse_direction_option(const std::string &text, std::vector<prune_stage> *stages) {
    const size_t colon = text.find(':');
    int layer;
    std::vector<uint8_t> bytes;
    std::vector<float> direction;
    if (colon == std::string::npos || !parse_whole(text.substr(0, colon), 0, max_layer, &layer) ||
        !parse_hex(text.substr(colon + 1), &bytes) || !parse_direction(bytes.data(), bytes.size(), &direction)) {
        return false;
    }
    const auto stage =
        std::find_if(stages->begin(), stages->end(), [layer](const prune_stage &s) { return s.layer == layer; });
    if (stage == stages->end() || stage->direction) return false;
    stage->direction = std::make_shared<const std::vector<float>>(std::move(direction));
    return true;
}

/// Parses LAYER:L.H+L.H..., the heads of the score `heads` for a stage of the list, or `all`, for all stages.
bool parse_heads_option(const std::string &text, std::vector<prune_stage> *stages) {
    if (text == "all") {
        for (prune_stage &stage : *stages) stage.heads.all = true;
        return true;
    }
    const size_t colon = text.find(':');
    int layer;
    if (colon == std::string::npos || !parse_whole(text.substr(0, colon), 0, max_layer, &layer)) return false;
    const auto stage =
        std::find_if(stages->begin(), stages->end(), [layer](const prune_stage &s) { return s.layer == layer; });
    if (stage == stages->end() || !stage->heads.empty()) return false;
    for (const std::string &part : split(text.substr(colon + 1), '+')) {
        const size_t dot = part.find('.');
        attention_head head;
        if (dot == std::string::npos || !parse_whole(part.substr(0, dot), 0, layer, &head.layer) ||
            !parse_whole(part.substr(dot + 1), 0, max_layer, &head.head)) {
            return false;
        }
        stage->heads.heads.push_back(head);
    }
    return stage->heads.heads.size() <= max_prune_heads;
}

/// Parses a share above 0.
bool parse_share(const std::string &text, float *share) {
    double number;
    if (!parse_number(text, &number) || number <= 0 || number > 1) return false;
    *share = static_cast<float>(number);
    return true;
}

/// Whether dropped tokens can come back by a share: tokens are kept for later questions, and no threshold chooses.
bool can_revive(const prune_settings &settings, const score *measure, int reuse) {
    const auto by_share = [](const prune_stage &stage) { return stage.rule.by_share; };
    return measure->input == score_input::heads && reuse == 0 && !settings.mask_only &&
           std::all_of(settings.stages.begin(), settings.stages.end(), by_share);
}

/// Parses the part before the first semicolon.
bool parse_source(const std::string &text, prune_settings *settings) {
    using kind = prune_settings::source_kind;
    if (text.empty() || text == "file") return true;
    if (text == "off") {
        settings->source = kind::off;
        return true;
    }
    std::vector<std::string> parts = split(text, ',');
    if (parts[0] == "mask") {
        settings->mask_only = true;
        parts.erase(parts.begin());
        if (parts.empty()) return true;
    }
    settings->source = kind::list;
    for (const std::string &part : parts) {
        if (!parse_stage(part, &settings->stages.emplace_back())) return false;
    }
    auto &stages = settings->stages;
    std::sort(stages.begin(), stages.end(), [](const auto &a, const auto &b) { return a.layer < b.layer; });
    const auto same_layer = [](const auto &a, const auto &b) { return a.layer == b.layer; };
    return std::adjacent_find(stages.begin(), stages.end(), same_layer) == stages.end();
}

}  // namespace

bool parse_prune_settings(const std::string &text, prune_settings *settings, std::string *error) {
    *settings = {};
    const std::vector<std::string> parts = split(text, ';');
    settings->given = parts.size() > 1 || !parts[0].empty();
    bool good = parse_source(parts[0], settings);
    const score *measure = &score_received;
    const bool is_list = settings->source == prune_settings::source_kind::list;
    int keep = 0, reach = 0, reuse = 0, tail = head_choice::no_overlap;
    float revive = 0;
    for (size_t i = 1; good && i < parts.size(); ++i) {
        if (parts[i].compare(0, 6, "score=") == 0) {
            // Only for a list: a file's thresholds were chosen for its own score, keep and reach.
            measure = find_score(parts[i].substr(6));
            good = is_list && measure;
        } else if (parts[i].compare(0, 5, "keep=") == 0) {
            good = is_list && parse_whole(parts[i].substr(5), 0, max_keep, &keep);
        } else if (parts[i].compare(0, 6, "reach=") == 0) {
            good = is_list && parse_whole(parts[i].substr(6), 0, max_reach, &reach);
        } else if (parts[i].compare(0, 6, "reuse=") == 0) {
            // With reused states nothing is hidden, so mask_only has nothing to compare.
            good = is_list && !settings->mask_only && parse_whole(parts[i].substr(6), 0, 1, &reuse);
        } else if (parts[i].compare(0, 10, "direction=") == 0) {
            good = is_list && parse_direction_option(parts[i].substr(10), &settings->stages);
        } else if (parts[i].compare(0, 6, "heads=") == 0) {
            good = is_list && parse_heads_option(parts[i].substr(6), &settings->stages);
        } else if (parts[i].compare(0, 8, "overlap=") == 0) {
            good = is_list && parse_whole(parts[i].substr(8), 0, max_prune_tail, &tail);
        } else if (parts[i].compare(0, 7, "revive=") == 0) {
            good = is_list && parse_share(parts[i].substr(7), &revive);
        } else if (parts[i].compare(0, 4, "min=") == 0) {
            good = parse_whole(parts[i].substr(4), 2, 1 << 30, &settings->min_tokens);
        } else {
            good = false;
        }
    }
    good = good && (revive == 0 || can_revive(*settings, measure, reuse));
    for (prune_stage &stage : settings->stages) {
        stage.measure = measure;
        stage.keep = keep;
        stage.reach = reach;
        stage.reuse = reuse == 1;
        stage.heads.tail = tail;
        stage.revive = revive;
    }
    if (!good) {
        const std::string shown = text.size() > shown_length ? text.substr(0, shown_length) + "..." : text;
        *error =
            "pruning is set to '" + shown +
            "', which is not understood; it must be 'file', 'off', 'mask', a list such as '3:0.5' (share) or " +
            "'3:t0.1' (threshold) with each layer once, or 'mask,' and a list. A list may be followed by ';score=" +
            score_names() +
            "', ';keep=TOKENS' (up to 255), ';reach=TOKENS' (up to 15), ';reuse=0|1', ';direction=LAYER:BYTES', "
            "';heads=LAYER:L.H+L.H', ';overlap=TOKENS' (up to 63) and, with shares and ';score=heads', "
            "';revive=SHARE'; all may be followed by ';min=TOKENS'";
    }
    return good;
}

}  // namespace agq
