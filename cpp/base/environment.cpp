// Reads the environment; nothing else in the plugin does.
#include "base/environment.h"

#include <cstdlib>

namespace agq {

options read_options() {
    options result;
    if (const char *isa = std::getenv("AGQ_FORCE_ISA")) result.force_isa = isa;
    if (const char *fuse = std::getenv("AGQ_FUSE")) result.fuse = std::string(fuse) != "0";
    if (const char *all = std::getenv("AGQ_TAKE_ALL")) result.take_all = std::string(all) == "1";
    return result;
}

namespace {

std::string variable(const char *name) {
    const char *text = std::getenv(name);
    return text ? text : "";
}

}  // namespace

std::string prune_option() {
    return variable("AGQ_PRUNE");
}

std::string activation_bits_option() {
    return variable("AGQ_ACT_BITS");
}

std::string attention_option() {
    return variable("AGQ_ATTENTION");
}

}  // namespace agq
