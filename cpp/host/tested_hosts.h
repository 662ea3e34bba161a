// The releases with which the plugin was tested; this is the only such list in the project. There is no upper bound:
// abi_proof.h decides about every host from the first version on. benchmarks/hosts.py tests hosts and writes the table
// in docs/releases.md.
#pragma once

// X(version of ggml, name of the package or program, its version), oldest ggml first.
#define AGQ_TESTED_HOSTS(X)                   \
    X("0.15.1", "llama-cpp-python", "0.3.30") \
    X("0.16.0", "llama-cpp-python", "0.3.34") \
    X("0.20.0", "llama-cpp-python", "0.3.35") \
    X("0.25.3", "llama-cpp-python", "0.3.36") \
    X("0.26.0", "xllamacpp", "2026.10.11549") \
    X("0.27.0", "llama-cpp-py-sync", "0.11739")
