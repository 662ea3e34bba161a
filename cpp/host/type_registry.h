// Registers the type AGQ4 in the running host, by filling a retired slot of ggml's type table.
#pragma once

#include <string>

namespace agq {

/// Fills slot `ggml_type_id`, once per process; later calls do nothing. Only an empty slot is filled. If the slot is in
/// use, or the table cannot be made writable, returns false and sets `*error` to what was found.
bool register_type(std::string *error);

/// Clears the slot if `register_type` filled it.
void unregister_type();

}  // namespace agq
