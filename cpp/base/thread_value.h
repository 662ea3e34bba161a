// A value of each thread, for types with a destructor, in a library that the host may unload.
//
// glibc keeps a library for as long as a thread lives that has used a `thread_local` with a destructor in it: then
// unloading does nothing, and the next load finds the old state. A key of POSIX threads holds no library. What is lost:
// values of other threads that are still alive when the library goes are not freed.
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

/// The calling thread's value of type T; `Tag` tells values of one type apart. Throws bad_alloc when it is made and
/// there is no memory.
template <class T, class Tag>
T &thread_value() {
    static const detail::thread_key<T> key;
    return key.get();
}

}  // namespace agq

#endif
