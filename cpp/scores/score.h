// The pruning scores: measures of a token's importance (docs/pruning.md, "Scores").
//
// To add one, write a file scores/NAME.cpp that defines `score_NAME`, and add a row to the table below and a line to
// CMakeLists.txt. For a score that files can store, also give it the number after `max_prune_score` (format/blocks.h)
// and add a row to agq_gguf/format/pruning_record.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "graph/graph_facts.h"
#include "graph/ubatch.h"
#include "kernels/attention.h"
#include "nodes/attention.h"

namespace agq {

/// The weights of a token's state, one number per channel; found by calibration.
using state_direction = std::shared_ptr<const std::vector<float>>;

/// The input of a score; it decides where in the graph the score is measured.
enum class score_input : uint8_t {
    position,   ///< a token's position: nothing is measured
    attention,  ///< queries and keys, before the attention of the pruning layer
    state,      ///< a token's state after that attention
    heads       ///< queries and keys of this layer and of earlier ones (scores/heads.h)
};

/// The data to measure. Which fields are set depends on the score's input.
struct score_source {
    int layer = 0;
    attention_site site;                 ///< the attention of the layer, with its current queries and mask
    key_group keys;                      ///< the keys that the tokens see; n = 0: all of the mask
    const ggml_tensor *state = nullptr;  ///< F32 [channels, tokens]
    state_direction direction;           ///< from a list or the file; null if neither has one
};

/// The tokens that are not dropped.
struct score_tokens {
    std::vector<int32_t> rows;       ///< of the queries, the mask and the state, ascending
    std::vector<int32_t> cells;      ///< the key of each of these tokens
    std::vector<int32_t> positions;  ///< in the sequence
    int32_t first_cell = 0;          ///< the key of the first token of the sequence
};

/// Runs one measurement after another and reuses its memory.
class score_meter {
  public:
    virtual ~score_meter() = default;

    score_tokens tokens;  ///< the tokens to measure; set before `prepare`

    /// Prepares a measurement on up to `threads` threads. Throws std::bad_alloc.
    virtual void prepare(const score_source &source, int threads) = 0;
    /// The work of thread `ith`, while the graph runs; not called for scores of the position.
    virtual void run(int ith, int nth) = 0;
    /// The importance of each of `tokens`, NaN where it is not defined.
    virtual std::vector<float> result() const = 0;
};

/// Function of the custom node that runs a measurement; `userdata` is the score_meter.
void measure_node(ggml_tensor *dst, int ith, int nth, void *userdata);

constexpr int not_stored = -1;  ///< number of a score that files cannot store

struct score {
    const char *name;  ///< as in AGQ_PRUNE and AGQ_ACT_BITS
    int number;        ///< in a file's pruning record (format/blocks.h has the largest), or not_stored
    score_input input;
    int protected_last;    ///< this many last tokens always stay
    bool needs_direction;  ///< whether it needs a direction, from the file or from a list
    std::unique_ptr<score_meter> (*make_meter)(const attention_kernel *kern);  ///< null if the input is `heads`
    /// Returns why the score cannot use the source, empty if it can. Null: any source with its input will do.
    std::string (*find_obstacle)(const score_source &source) = nullptr;
    bool looks_at_first = false;  ///< whether every token must see the first one of the sequence
};

#define AGQ_SCORES(row) row(first) row(received) row(recent) row(learned) row(heads) row(random)

#define AGQ_DECLARE_SCORE(name) extern const score score_##name;
AGQ_SCORES(AGQ_DECLARE_SCORE)
#undef AGQ_DECLARE_SCORE

/// The reason why a score cannot be measured in a part of a ubatch at an attention, empty if it can.
std::string find_unseen(const score &measure, const ubatch_part &part, const attention_site &site);

/// The score of this name, or null.
const score *find_score(const std::string &name);

/// The score with this number in files, or null.
const score *find_score(int number);

/// The names of all scores with this input, or with any, such as "first
/// received", for messages.
std::string score_names();
std::string score_names(score_input input);

}  // namespace agq
