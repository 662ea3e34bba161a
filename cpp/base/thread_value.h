// A per-thread value for types with a destructor, in a library that the host may unload.
//
// If a thread uses a `thread_local` with a destructor, glibc keeps the library loaded as long as that thread lives.
// Unloading then does nothing, and the next load finds the old state. A POSIX thread key does not hold the library. The
// cost: if other threads are alive when the library is unloaded, their values are leaked.
#pragma once

#ifdef _WIN32

namespace agq {

template <class T, class Tag>
T &thread_value() {
    thread_local T value;
    return value;
}

}  // namespace agq

#else

#include <pthread.h>

#include <new>

namespace agq {

namespace detail {

template <class T>
class thread_key {
  public:
    thread_key() { valid_ = pthread_key_create(&key_, destroy) == 0; }
    thread_key(const thread_key &) = delete;
    thread_key &operator=(const thread_key &) = delete;
    ~thread_key() {
        if (!valid_) return;
        destroy(pthread_getspecific(key_));
        pthread_key_delete(key_);
    }

    T &get() const {
        if (!valid_) throw std::bad_alloc();
        void *value = pthread_getspecific(key_);
        if (!value) {
            value = new T();
            if (pthread_setspecific(key_, value) != 0) {
                destroy(value);
                throw std::bad_alloc();
            }
        }
        return *static_cast<T *>(value);
    }

  private:
    static void destroy(void *value) { delete static_cast<T *>(value); }

    pthread_key_t key_;
    bool valid_;
};

}  // namespace detail

/// The calling thread's value of type T; `Tag` distinguishes values of one type. The first call creates the value and
/// throws bad_alloc if memory runs out.
template <class T, class Tag>
T &thread_value() {
    static const detail::thread_key<T> key;
    return key.get();
}

}  // namespace agq

#endif
