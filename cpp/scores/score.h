// The pruning scores: ways to measure how important a token is (docs/pruning.md, "Scores").
//
// Adding one is a file scores/NAME.cpp that defines `score_NAME`, a row of the table below, and the file's line in
// CMakeLists.txt. If files are to store it, it also gets the number after `max_prune_score` (format/blocks.h) and a row
// in agq_gguf/format/pruning_record.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "graph/graph_facts.h"
#include "kernels/attention.h"

namespace agq {

/// What the state of a token is multiplied with, one number for each channel; calibration found it.
using state_direction = std::shared_ptr<const std::vector<float>>;

/// What a score looks at, which decides where in the graph it is measured.
enum class score_input : uint8_t {
    position,   ///< where a token stands: nothing is measured
    attention,  ///< queries and keys, in front of the attention of the pruning layer
    state       ///< the state of a token behind that attention
};

/// What is measured. Which parts are filled in depends on the score's input.
struct score_source {
    int layer = 0;
    attention_site site;                 ///< the attention of the layer, with queries and mask as they are now
    const ggml_tensor *state = nullptr;  ///< F32 [channels, tokens]
    state_direction direction;           ///< from the file; null if it has none
};

/// The tokens that are still there.
struct score_tokens {
    std::vector<int32_t> rows;       ///< of the queries, the mask and the state, ascending
    std::vector<int32_t> cells;      ///< the key of each of these tokens
    std::vector<int32_t> positions;  ///< in the sequence
    int32_t first_cell = 0;          ///< the key of the first token of the sequence
};

/// One measurement after another; memory is kept from one to the next.
class score_meter {
  public:
    virtual ~score_meter() = default;

    score_tokens tokens;  ///< whose importance is measured; set before `prepare`

    /// Gets ready for a measurement on up to `threads` threads. Throws std::bad_alloc.
    virtual void prepare(const score_source &source, int threads) = 0;
    /// The part of thread `ith`, while the graph runs; not called for scores of the position.
    virtual void run(int ith, int nth) = 0;
    /// The importance of each of `tokens`, NaN where it is not defined.
    virtual std::vector<float> result() const = 0;
};

/// Function of the custom node in which a measurement runs; `userdata` is the score_meter.
void measure_node(ggml_tensor *dst, int ith, int nth, void *userdata);

constexpr int not_stored = -1;  ///< number of a score that files cannot ask for

struct score {
    const char *name;  ///< in AGQ_PRUNE and AGQ_ACT_BITS
    int number;        ///< in the pruning record of a file (format/blocks.h has the largest), or not_stored
    score_input input;
    int protected_last;    ///< the last so many tokens always stay
    bool needs_direction;  ///< whether it is computed with a direction from the file
    std::unique_ptr<score_meter> (*make_meter)(const attention_kernel *kern);
    /// Why the source does not suit the score, empty if it does; null: a source with its input always does.
    std::string (*find_obstacle)(const score_source &source) = nullptr;
};

#define AGQ_SCORES(row) row(first) row(received) row(recent) row(learned) row(random)

#define AGQ_DECLARE_SCORE(name) extern const score score_##name;
AGQ_SCORES(AGQ_DECLARE_SCORE)
#undef AGQ_DECLARE_SCORE

/// The score of this name, or null.
const score *find_score(const std::string &name);

/// The score with this number in files, or null.
const score *find_score(int number);

/// The names of all scores with this input, or with any, as "first|received", for messages.
std::string score_names();
std::string score_names(score_input input);

}  // namespace agq
