// Empties the type's slot when the host unloads the plugin: a model of that type is then refused, as before the plugin
// was loaded, where its operations would now call nothing.
//
// When the process ends, the slot is left alone: other threads may still be running a model. What tells the two apart
// is the order in which things end.
#include "host/type_registry.h"

#ifdef _WIN32

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

BOOL WINAPI DllMain(HINSTANCE, DWORD reason, LPVOID process_ends) {
    if (reason == DLL_PROCESS_DETACH && !process_ends) agq::unregister_type();
    return TRUE;
}

#else

namespace {

bool process_ends = false;

/// At the end of the process objects are destroyed before libraries end; a library that is unloaded ends first.
struct end_of_process {
    ~end_of_process() { process_ends = true; }
} watch;

__attribute__((destructor)) void end_of_library() {
    if (!process_ends) agq::unregister_type();
}

}  // namespace

#endif
