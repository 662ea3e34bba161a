#include "base/environment.h"

#include <cstdlib>
#include <optional>

#include "base/thread_value.h"

namespace agq {

namespace {

/// Reads a variable that is one of three words into `*mode`; `words` are those of the modes 0, 1 and 2, and the first
/// one is the default, also for an empty variable. Any other value is an error.
template <typename Mode>
void read_mode(const char *variable, const char *const (&words)[3], Mode *mode, std::string *error) {
    const char *text = std::getenv(variable);
    const std::string given = text && *text ? text : words[0];
    for (int i = 0; i < 3; ++i) {
        if (given != words[i]) continue;
        *mode = static_cast<Mode>(i);
        return;
    }
    *error =
        std::string(variable) + " must be " + words[0] + ", " + words[1] + " or " + words[2] + ", got '" + given + "'";
}

}  // namespace

options read_options() {
    options result;
    if (const char *isa = std::getenv("AGQ_FORCE_ISA")) result.force_isa = isa;
    if (const char *fuse = std::getenv("AGQ_FUSE")) result.fuse = std::string(fuse) != "0";
    if (const char *all = std::getenv("AGQ_TAKE_ALL")) result.take_all = std::string(all) == "1";
    read_mode("AGQ_WAIT", {"auto", "spin", "sleep"}, &result.wait, &result.error);
    read_mode("AGQ_HUGE_PAGES", {"auto", "on", "off"}, &result.huge_pages, &result.error);
    return result;
}

namespace {

constexpr size_t option_count = 4;
constexpr const char *variables[option_count] = {"AGQ_PRUNE", "AGQ_ACT_BITS", "AGQ_ATTENTION", "AGQ_FORCE_ISA"};

struct thread_options {
    std::optional<std::string> values[option_count];
};

std::optional<std::string> &of_thread(context_option which) {
    return thread_value<thread_options, struct options_of_thread>().values[static_cast<size_t>(which)];
}

}  // namespace

std::string read_context_option(context_option which) {
    if (const auto &own = of_thread(which)) return *own;
    const char *text = std::getenv(variables[static_cast<size_t>(which)]);
    return text ? text : "";
}

void set_context_option(context_option which, const char *text) {
    auto &own = of_thread(which);
    if (text) {
        own = text;
    } else {
        own.reset();
    }
}

}  // namespace agq
