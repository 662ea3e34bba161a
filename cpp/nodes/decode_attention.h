// Attention of few rows: generation, and batches of a few tokens. Keys are not packed per head here. The cells of a
// group are read once, in chunks of keys that threads take in turn; the thread that finishes the last chunk combines
// the results.
#pragma once

#include <atomic>

#include "nodes/attention.h"

namespace agq {

/// Whether this implementation suits a group of so many tokens, of a job that must otherwise be supported.
bool suits_few(const attention_job &job, int64_t tokens);

/// Scratch memory in bytes that groups of a job need in each thread.
size_t few_bytes(const attention_job &job);

/// Number of chunks of a group's keys. It depends on nothing but the number of keys.
int64_t few_chunks(const attention_job &job, const key_group &keys);

/// Size of `attention_part::partial` in floats.
int64_t few_partial_floats(const attention_job &job, const key_group &keys);

/// Runs chunks on one thread, and keeps the queries of the latest part.
class few_worker {
  public:
    few_worker(const attention_job &job, void *memory) : job_(job), memory_(memory) {}
    /// Runs a chunk. `finished`: number of finished chunks of this part.
    void run(const attention_part &part, int64_t chunk, int nth, std::atomic<int> *finished, float *dst);
    /// The memory has been used for something else.
    void forget() { part_ = nullptr; }

  private:
    const attention_job &job_;
    void *memory_;
    const attention_part *part_ = nullptr;
};

}  // namespace agq
