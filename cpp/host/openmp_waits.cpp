// GNU OpenMP reads how long threads spin from the environment, once. But it spins only briefly while the process has
// more OpenMP threads than CPUs. So a thread of ours holds a team of that size, whose members sleep.
#include "host/openmp_waits.h"

#ifdef __linux__

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "host/host.h"
#include "host/loaded_library.h"

namespace agq {

namespace {

using parallel_fn = void (*)(void (*)(void *), void *, unsigned, unsigned);
using count_fn = int (*)();

/// The thread that holds the team, and how many objects want it.
class crowd {
  public:
    void join() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (++wanted_ > 1 || !host.openmp) return;
        // The backend links to OpenMP, so its library finds the functions.
        const loaded_library backend(cpu_function("ggml_backend_set_n_threads"));
        const auto parallel = reinterpret_cast<parallel_fn>(backend.find("GOMP_parallel"));
        const auto cpus = reinterpret_cast<count_fn>(backend.find("omp_get_num_procs"));
        if (!parallel || !cpus) return;
        stop_ = false;
        try {
            holder_ = std::thread([this, parallel, cpus] {
                parallel([](void *) {}, nullptr, static_cast<unsigned>(cpus()) + 1, 0);
                std::unique_lock<std::mutex> waiting(stopping_);
                changed_.wait(waiting, [this] { return stop_; });
            });
        } catch (const std::system_error &) {
            return;  // no more threads: waits stay as they are
        }
    }

    void leave() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--wanted_ > 0 || !holder_.joinable()) return;
        {
            const std::lock_guard<std::mutex> stopping(stopping_);
            stop_ = true;
        }
        changed_.notify_one();
        holder_.join();
    }

  private:
    std::mutex mutex_, stopping_;
    std::condition_variable changed_;
    std::thread holder_;
    bool stop_ = false;
    int wanted_ = 0;
};

/// Never destroyed: a process may end while contexts that want the thread are still there.
crowd &the_crowd() {
    static crowd *one = new crowd;
    return *one;
}

}  // namespace

void sleeping_waits::turn_on() {
    if (!on_) the_crowd().join();
    on_ = true;
}

void sleeping_waits::turn_off() {
    if (on_) the_crowd().leave();
    on_ = false;
}

}  // namespace agq

#else

namespace agq {

void sleeping_waits::turn_on() {
    on_ = true;
}

void sleeping_waits::turn_off() {
    on_ = false;
}

}  // namespace agq

#endif
