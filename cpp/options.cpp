// Reads the environment; nothing else in the plugin does.
#include "options.h"

#include <cstdlib>

namespace agq {

options read_options() {
    options result;
    if (const char *isa = std::getenv("AGQ_FORCE_ISA")) result.force_isa = isa;
    if (const char *fuse = std::getenv("AGQ_FUSE")) result.fuse = std::string(fuse) != "0";
    return result;
}

std::string prune_option() {
    const char *text = std::getenv("AGQ_PRUNE");
    return text ? text : "";
}

}  // namespace agq
