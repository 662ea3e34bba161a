#include "kernels/select.h"

namespace agq {
namespace {

std::string names(bool only_supported) {
    std::string list;
    for (const kernel *row : compiled_kernels()) {
        if (only_supported && !row->supported()) continue;
        if (!list.empty()) list += ", ";
        list += row->name;
    }
    return list;
}

const kernel *find(const std::string &name) {
    for (const kernel *row : compiled_kernels()) {
        if (name == row->name) return row;
    }
    return nullptr;
}

}  // namespace

const std::vector<const kernel *> &compiled_kernels() {
#define AGQ_ADDRESS(name) &kernel_##name,
    static const std::vector<const kernel *> table = {AGQ_KERNELS(AGQ_ADDRESS)};
#undef AGQ_ADDRESS
    return table;
}

const kernel *select_kernel(const char *forced_name, std::string *error) {
    if (forced_name != nullptr && *forced_name != '\0') {
        const kernel *row = find(forced_name);
        if (row != nullptr && row->supported()) return row;
        if (error != nullptr) {
            *error = std::string("AGQ_FORCE_ISA is '") + forced_name + "', which is " +
                     (row == nullptr ? "not a known kernel" : "not supported by this CPU or operating system") +
                     "; all kernels: " + names(false) + "; supported here: " + names(true);
        }
        return nullptr;
    }
    for (const kernel *row : compiled_kernels()) {
        if (row->supported()) return row;
    }
    return &kernel_scalar;  // unreachable: the last row runs everywhere
}

}  // namespace agq
