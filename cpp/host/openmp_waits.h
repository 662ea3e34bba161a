// How OpenMP's threads wait for one another: they spin, which is fastest, until somebody asks that they sleep.
#pragma once

namespace agq {

/// As long as one object of a process is `on`, threads of GNU OpenMP that wait at a barrier sleep almost at once
/// instead of spinning for milliseconds. Without GNU OpenMP in the host, `turn_on` does nothing.
class sleeping_waits {
  public:
    sleeping_waits() = default;
    ~sleeping_waits() { turn_off(); }
    sleeping_waits(const sleeping_waits &) = delete;
    sleeping_waits &operator=(const sleeping_waits &) = delete;

    void turn_on();
    void turn_off();

  private:
    bool on_ = false;
};

}  // namespace agq
