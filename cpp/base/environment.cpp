#include "base/environment.h"

#include <cstdlib>
#include <optional>

#include "base/thread_value.h"

namespace agq {

options read_options() {
    options result;
    if (const char *isa = std::getenv("AGQ_FORCE_ISA")) result.force_isa = isa;
    if (const char *fuse = std::getenv("AGQ_FUSE")) result.fuse = std::string(fuse) != "0";
    if (const char *all = std::getenv("AGQ_TAKE_ALL")) result.take_all = std::string(all) == "1";
    const char *given = std::getenv("AGQ_WAIT");
    const std::string wait = given ? given : "auto";
    if (wait == "spin") {
        result.wait = wait_mode::spin;
    } else if (wait == "sleep") {
        result.wait = wait_mode::sleep;
    } else if (wait != "auto") {
        result.error = "AGQ_WAIT must be auto, spin or sleep, got '" + wait + "'";
    }
    const char *pages = std::getenv("AGQ_HUGE_PAGES");
    const std::string huge_pages = pages ? pages : "auto";
    if (huge_pages == "on") {
        result.huge_pages = huge_pages_mode::on;
    } else if (huge_pages == "off") {
        result.huge_pages = huge_pages_mode::off;
    } else if (huge_pages != "auto") {
        result.error = "AGQ_HUGE_PAGES must be auto, on or off, got '" + huge_pages + "'";
    }
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
