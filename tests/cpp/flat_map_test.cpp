// The flat map must agree with the standard library's map after any operations.
#include "base/flat_map.h"

#include <memory>
#include <new>
#include <unordered_map>

#include "checks.h"

namespace {

using values = agq::flat_map<uint64_t, std::shared_ptr<int>>;

void check_same(const values &ours, const std::unordered_map<uint64_t, int> &theirs, uint64_t n_keys) {
    CHECK(ours.size() == theirs.size(), "%zu and %zu", ours.size(), theirs.size());
    for (uint64_t key = 0; key < n_keys; ++key) {
        const std::shared_ptr<int> *found = ours.find(key);
        const auto wanted = theirs.find(key);
        CHECK((found != nullptr) == (wanted != theirs.end()), "key %d", static_cast<int>(key));
        if (found && wanted != theirs.end()) CHECK(**found == wanted->second, "key %d", static_cast<int>(key));
    }
}

void test_operations(int n_keys) {
    values ours;
    std::unordered_map<uint64_t, int> theirs;
    if (chance(2)) ours.reserve(static_cast<size_t>(random_int(0, n_keys)));
    const auto any_key = [n_keys] { return static_cast<uint64_t>(random_int(0, n_keys - 1)); };
    for (int i = 0; i < 500; ++i) {
        const uint64_t key = any_key();
        if (chance(2)) {
            const auto [value, is_new] = ours.add(key);
            CHECK(is_new == (theirs.count(key) == 0), "key %d", static_cast<int>(key));
            *value = std::make_shared<int>(i);
            theirs[key] = i;
        } else {
            ours.erase(key);
            theirs.erase(key);
        }
        if (i % 50 == 0) check_same(ours, theirs, static_cast<uint64_t>(n_keys));
    }
    check_same(ours, theirs, static_cast<uint64_t>(n_keys));
}

void test_values_are_freed() {
    const auto value = std::make_shared<int>(1);
    {
        values ours;
        for (uint64_t key = 0; key < 100; ++key) *ours.add(key).first = value;
        CHECK(value.use_count() == 101, "%ld", value.use_count());
        for (uint64_t key = 0; key < 50; ++key) ours.erase(key);
        CHECK(value.use_count() == 51, "%ld", value.use_count());
    }
    CHECK(value.use_count() == 1, "%ld", value.use_count());
}

/// A value for which there may be no memory.
struct large {
    static inline bool lacks_memory = false;
    int number = 0;
    large() {
        if (lacks_memory) throw std::bad_alloc();
    }
};

void test_without_memory() {
    agq::flat_map<uint64_t, large> map;
    int failed = 0;
    for (uint64_t key = 0; key < 200; ++key) {
        large::lacks_memory = true;
        try {
            map.add(key);
        } catch (const std::bad_alloc &) {
            ++failed;
        }
        large::lacks_memory = false;
        map.add(key).first->number = static_cast<int>(key);
        for (uint64_t before = 0; before <= key; ++before) {
            const large *found = map.find(before);
            CHECK(found && found->number == static_cast<int>(before), "key %d", static_cast<int>(before));
        }
    }
    CHECK(failed >= 4 && failed < 20, "%d", failed);
}

}  // namespace

int main() {
    for (int i = 0; i < 300; ++i) test_operations(random_int(1, 200));
    test_values_are_freed();
    test_without_memory();
    if (failures == 0) std::printf("ok\n");
    return failures != 0;
}
