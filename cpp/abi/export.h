// How an entry point of the plugin library is marked, and how it learns who called it.
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
