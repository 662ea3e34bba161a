// libFuzzer's entry: build with -DAGQ_BUILD_FUZZERS=ON and clang (tests/fuzz/README.md).
#include "attributes_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    agq_fuzz::parse_attributes_of(data, size);
    return 0;
}
