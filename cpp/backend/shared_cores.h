// What to do when other processes use the cores, too.
//
// Threads that wait at a barrier spin. On a busy machine the thread they wait for may have lost its core, so all spin
// for a whole time slice, at every barrier: ten times slower than one thread. So when the computing thread is
// interrupted often, waiting threads sleep, and graphs run with as many threads as turn out to be fastest
// (thread_choice.h).
#pragma once

#include <cstdint>

#include "backend/thread_choice.h"
#include "base/environment.h"
#include "host/openmp_waits.h"

namespace agq {

class shared_cores {
  public:
    explicit shared_cores(wait_mode mode);
    /// Call before a graph that computes `n_tokens` tokens; returns the number of threads to use, at most `n_threads`.
    int begin(int n_threads, int64_t n_tokens);
    /// Call after it, in the same thread.
    void end();

  private:
    const wait_mode mode_;
    thread_choice choice_;
    sleeping_waits waits_;
    int64_t begun_ = 0, interruptions_ = 0;
};

}  // namespace agq
