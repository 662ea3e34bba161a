// How entry points of the plugin library are exported, and how they get the address of their caller.
#pragma once

#ifdef _MSC_VER
#include <intrin.h>
#define AGQ_CALLER _ReturnAddress()
#else
#define AGQ_CALLER __builtin_return_address(0)
#endif

#ifdef _WIN32
#define AGQ_EXPORT extern "C" __declspec(dllexport)
#else
#define AGQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif
