// Attention jobs of few rows: generation, and batches of a few tokens. Where attention_job packs a head, this reads the
// cache once, in chunks of keys that threads take in turn; whoever finishes the last one puts them together.
#pragma once

#include "nodes/attention.h"
#include "nodes/custom_node.h"

namespace agq {

/// Whether the job is better done so; it must be covered otherwise.
bool suits_few(const attention_job &job);

/// Scratch memory that a job needs in each thread.
size_t few_bytes(const attention_job &job);

/// Floats of attention_job::partial.
int64_t few_partial_floats(const attention_job &job);

/// Function of the custom node; `userdata` is the attention_job.
void few_attention_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node attend_few{few_attention_node, true};
}  // namespace node

}  // namespace agq
