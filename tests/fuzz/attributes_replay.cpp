// Runs the fuzzer's target on inputs from stdin, each behind its length (u32, little endian), and prints '1' or '0' for
// each: accepted or refused. So Python can compare its own parser, and the inputs that once failed are tried again
// without a fuzzer.
#include <iostream>

#include "attributes_target.h"

int main() {
    std::string verdicts;
    std::vector<uint8_t> input;
    uint8_t length[4];
    while (std::cin.read(reinterpret_cast<char *>(length), 4)) {
        const size_t n = length[0] | length[1] << 8 | length[2] << 16 | static_cast<size_t>(length[3]) << 24;
        if (n > 1 << 20) return 2;
        input.resize(n);
        if (n > 0 && !std::cin.read(reinterpret_cast<char *>(input.data()), static_cast<std::streamsize>(n))) return 2;
        verdicts += agq_fuzz::parse_attributes_of(input.data(), n) ? '1' : '0';
    }
    std::cout << verdicts << '\n';
}
