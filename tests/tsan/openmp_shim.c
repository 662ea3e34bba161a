/* The part of libgomp that ggml uses, on POSIX threads: ThreadSanitizer sees these, while it is blind to the futexes of
 * the real one and would call every hand-over between threads a race. Preloaded by tests/test_tsan.py. */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

struct team {
    pthread_barrier_t barrier;
    pthread_mutex_t lock;
    unsigned size, singles_begun;
    void (*function)(void *);
    void *data;
};

struct member {
    struct team *team;
    unsigned number, singles_seen;
};

static _Thread_local struct member *me;

int omp_get_thread_num(void) { return me ? (int)me->number : 0; }

int omp_get_num_threads(void) { return me ? (int)me->team->size : 1; }

int omp_get_max_threads(void) { return 16; }

int omp_get_thread_limit(void) { return 16; }

void omp_set_num_threads(int n) { (void)n; }

void GOMP_barrier(void) {
    if (me) pthread_barrier_wait(&me->team->barrier);
}

bool GOMP_single_start(void) {
    if (!me) return true;
    pthread_mutex_lock(&me->team->lock);
    const bool first = me->singles_seen++ == me->team->singles_begun;
    if (first) me->team->singles_begun++;
    pthread_mutex_unlock(&me->team->lock);
    return first;
}

static void *run_member(void *argument) {
    me = argument;
    me->team->function(me->team->data);
    me = NULL;
    return NULL;
}

void GOMP_parallel(void (*function)(void *), void *data, unsigned n, unsigned flags) {
    (void)flags;
    if (n == 0) n = 1;
    struct team team = {.size = n, .function = function, .data = data};
    pthread_t threads[64];
    struct member members[64];
    if (n > 64) abort();
    pthread_barrier_init(&team.barrier, NULL, n);
    pthread_mutex_init(&team.lock, NULL);
    for (unsigned i = 0; i < n; ++i) members[i] = (struct member){.team = &team, .number = i};
    for (unsigned i = 1; i < n; ++i) {
        if (pthread_create(&threads[i], NULL, run_member, &members[i])) abort();
    }
    run_member(&members[0]);
    for (unsigned i = 1; i < n; ++i) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&team.barrier);
    pthread_mutex_destroy(&team.lock);
}
