// How an entry point of the plugin library is marked.
#pragma once

#ifdef _WIN32
#define AGQ_EXPORT extern "C" __declspec(dllexport)
#else
#define AGQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif
