// The pruning scores.
#pragma once

#include <cstdint>

namespace agq {

/// How the importance of a token is measured (docs/pruning.md, "Scores"). The first four numbers are those of the file
/// format.
enum class prune_score : uint8_t { first = 0, received = 1, recent = 2, learned = 3, random = 4 };

constexpr int recent_queries = 8;  ///< last tokens whose attention `recent` looks at; they are kept

}  // namespace agq
