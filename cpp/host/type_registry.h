// Makes the running host know the type AGQ4, by filling a retired slot of ggml's type table.
#pragma once

#include <string>

namespace agq {

/// Fills slot `ggml_type_id`, once per process; later calls are no-ops. Only a slot that is empty is ever filled: on
/// anything else, or if the table cannot be made writable, returns false and `*error` says what was found.
bool register_type(std::string *error);

/// Empties the slot again, if `register_type` has filled it.
void unregister_type();

}  // namespace agq
