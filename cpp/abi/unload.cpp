// Clears the type's slot when the host unloads the plugin. AGQ4 models are then refused, as before the plugin was
// loaded; otherwise their operations would call code that is gone.
//
// When the process exits, the slot stays filled, because other threads may still be running a model. The order of
// destruction tells the two cases apart.
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

/// At process exit, objects are destroyed before the libraries' destructors run; when a library is unloaded, its
/// destructors run first.
struct end_of_process {
    ~end_of_process() { process_ends = true; }
} watch;

__attribute__((destructor)) void end_of_library() {
    if (!process_ends) agq::unregister_type();
}

}  // namespace

#endif
