// Attention jobs with few rows: generation, and batches of a few tokens. Keys are not packed per head here. The cache
// is read once, in chunks of keys that threads take in turn; the thread that finishes the last chunk combines the
// results.
#pragma once

#include "nodes/attention.h"
#include "nodes/custom_node.h"

namespace agq {

/// Whether this implementation suits the job, which must otherwise be supported.
bool suits_few(const attention_job &job);

/// Scratch memory in bytes that a job needs in each thread.
size_t few_bytes(const attention_job &job);

/// Size of `attention_job::partial` in floats.
int64_t few_partial_floats(const attention_job &job);

/// Function of the custom node; `userdata` is the attention_job.
void few_attention_node(ggml_tensor *dst, int ith, int nth, void *userdata);

namespace node {
constexpr custom_node attend_few{few_attention_node, true};
}  // namespace node

}  // namespace agq
