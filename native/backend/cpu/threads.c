/* threads.c — see threads.h. A run is one generation. Tasks are claimed by adding 1 to `claim`, one word that holds the
 * generation, the number of tasks and the next task, so that a claim is valid by itself: a worker that comes late sees
 * either no task left or a task of the job that is running now. The caller waits for tasks, not for workers: a worker that
 * the system does not run holds up nothing but a task it has begun. A thread that waits prefetches what the next run will
 * read: between operations the memory would be idle otherwise. Sleepers are counted, so a run without any makes no
 * system call.
 */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void cpu_pause(void) { _mm_pause(); }
#elif defined(__aarch64__)
static inline void cpu_pause(void) { __asm__ volatile("yield"); }
#else
static inline void cpu_pause(void) {}
#endif

enum { SPIN_NS = 30000, CLOCK_EVERY = 64 };

typedef struct {
    cv_threads *pool;
    size_t index;
    pthread_t thread;
    bool started;
} worker;

struct cv_threads {
    size_t n;
    worker *workers; /* [n-1] */
    cv_task_fn fn;   /* of the running job; written only while no task is left */
    void *context;
    _Alignas(64) _Atomic uint64_t claim; /* generation:24 | n_tasks:20 | next:20 */
    _Alignas(64) atomic_size_t finished;
    _Alignas(64) atomic_uint sleepers;
    atomic_bool caller_sleeps, stop;
    /* what waiting threads prefetch; torn reads of a range that is being replaced only prefetch something useless */
    _Alignas(64) atomic_size_t ahead_next; /* bytes taken of all ranges together */
    _Atomic(const char *) ahead[CV_THREADS_AHEAD];
    atomic_size_t ahead_bytes[CV_THREADS_AHEAD];
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
};

static uint64_t generation_of(uint64_t claim) { return claim >> 40; }
static size_t tasks_of(uint64_t claim) { return (claim >> 20) & 0xfffff; }
static size_t next_of(uint64_t claim) { return claim & 0xfffff; }

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Prefetches the next piece of the ranges that nobody has taken yet. */
static void read_ahead(cv_threads *t) {
    enum { PIECE = 256, LINE = 64 };
    size_t at = atomic_load_explicit(&t->ahead_next, memory_order_relaxed), end = 0;
    for (size_t i = 0; i < CV_THREADS_AHEAD; i++) end += atomic_load_explicit(&t->ahead_bytes[i], memory_order_relaxed);
    if (at >= end) return;
    at = atomic_fetch_add_explicit(&t->ahead_next, PIECE, memory_order_relaxed);
    for (size_t i = 0; i < CV_THREADS_AHEAD; i++) {
        const size_t bytes = atomic_load_explicit(&t->ahead_bytes[i], memory_order_relaxed);
        if (at < bytes) {
            const char *p = atomic_load_explicit(&t->ahead[i], memory_order_relaxed) + at;
            for (size_t line = 0; line < PIECE; line += LINE) __builtin_prefetch(p + line, 0, 2);
            return;
        }
        at -= bytes;
    }
}

void cv_threads_read_ahead(cv_threads *t, const cv_threads_range *ranges, size_t n) {
    for (size_t i = 0; i < CV_THREADS_AHEAD; i++) {
        atomic_store_explicit(&t->ahead[i], i < n ? ranges[i].data : NULL, memory_order_relaxed);
        atomic_store_explicit(&t->ahead_bytes[i], i < n ? ranges[i].bytes : 0, memory_order_relaxed);
    }
    atomic_store_explicit(&t->ahead_next, 0, memory_order_relaxed);
}

/* Works until no task is left. */
static void work(cv_threads *t, size_t thread) {
    for (;;) {
        uint64_t c = atomic_fetch_add(&t->claim, 1);
        if (next_of(c) >= tasks_of(c)) return;
        t->fn(t->context, next_of(c), thread);
        if (atomic_fetch_add(&t->finished, 1) + 1 == tasks_of(c) && atomic_load(&t->caller_sleeps)) {
            pthread_mutex_lock(&t->lock);
            pthread_cond_signal(&t->done);
            pthread_mutex_unlock(&t->lock);
        }
    }
}

/* Spins for a while until a generation other than `seen` is there; true when it is. */
static bool spin_for_job(cv_threads *t, uint64_t seen) {
    uint64_t end = 0;
    for (unsigned i = 1;; i++) {
        if (generation_of(atomic_load_explicit(&t->claim, memory_order_acquire)) != seen) return true;
        read_ahead(t);
        cpu_pause();
        if (i % CLOCK_EVERY) continue;
        uint64_t now = now_ns();
        if (!end) end = now + SPIN_NS;
        else if (now > end) return false;
    }
}

static void *worker_main(void *arg) {
    worker *w = arg;
    cv_threads *t = w->pool;
    uint64_t seen = 0;
    for (;;) {
        if (!spin_for_job(t, seen)) {
            pthread_mutex_lock(&t->lock);
            atomic_fetch_add(&t->sleepers, 1);
            while (generation_of(atomic_load(&t->claim)) == seen) pthread_cond_wait(&t->wake, &t->lock);
            atomic_fetch_sub(&t->sleepers, 1);
            pthread_mutex_unlock(&t->lock);
        }
        seen = generation_of(atomic_load(&t->claim));
        if (atomic_load(&t->stop)) return NULL;
        work(t, w->index);
    }
}

/* A new generation with n_tasks tasks. */
static void publish(cv_threads *t, size_t n_tasks) {
    uint64_t generation = (generation_of(atomic_load(&t->claim)) + 1) & 0xffffff;
    atomic_store(&t->claim, generation << 40 | (uint64_t)n_tasks << 20);
    if (atomic_load(&t->sleepers)) {
        pthread_mutex_lock(&t->lock);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->lock);
    }
}

static void wait_for_tasks(cv_threads *t, size_t n_tasks) {
    uint64_t end = 0;
    for (unsigned i = 1; atomic_load_explicit(&t->finished, memory_order_acquire) != n_tasks; i++) {
        read_ahead(t);
        cpu_pause();
        if (i % CLOCK_EVERY) continue;
        uint64_t now = now_ns();
        if (!end) end = now + SPIN_NS;
        else if (now > end) {
            pthread_mutex_lock(&t->lock);
            atomic_store(&t->caller_sleeps, true);
            while (atomic_load(&t->finished) != n_tasks) pthread_cond_wait(&t->done, &t->lock);
            atomic_store(&t->caller_sleeps, false);
            pthread_mutex_unlock(&t->lock);
            return;
        }
    }
}

cv_threads *cv_threads_open(size_t n_threads) {
    if (n_threads == 0) n_threads = 1;
    cv_threads *t = aligned_alloc(64, (sizeof *t + 63) & ~(size_t)63);
    if (!t) return NULL;
    *t = (cv_threads){.n = n_threads};
    if (pthread_mutex_init(&t->lock, NULL) || pthread_cond_init(&t->wake, NULL) || pthread_cond_init(&t->done, NULL)) {
        free(t);
        return NULL;
    }
    t->workers = calloc(n_threads, sizeof *t->workers);
    if (!t->workers) {
        cv_threads_close(t);
        return NULL;
    }
    for (size_t i = 0; i + 1 < n_threads; i++) {
        worker *w = &t->workers[i];
        *w = (worker){.pool = t, .index = i + 1};
        if (pthread_create(&w->thread, NULL, worker_main, w)) {
            cv_threads_close(t);
            return NULL;
        }
        w->started = true;
    }
    return t;
}

void cv_threads_close(cv_threads *t) {
    if (!t) return;
    if (t->workers) {
        pthread_mutex_lock(&t->lock);
        atomic_store(&t->stop, true);
        pthread_mutex_unlock(&t->lock);
        publish(t, 0);
        for (size_t i = 0; i + 1 < t->n; i++)
            if (t->workers[i].started) pthread_join(t->workers[i].thread, NULL);
        free(t->workers);
    }
    pthread_cond_destroy(&t->done);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

size_t cv_threads_count(const cv_threads *t) { return t->n; }

static void run_batch(cv_threads *t, size_t n_tasks, cv_task_fn fn, void *context) {
    t->fn = fn;
    t->context = context;
    atomic_store(&t->finished, 0);
    publish(t, n_tasks);
    work(t, 0);
    wait_for_tasks(t, n_tasks);
}

typedef struct {
    cv_task_fn fn;
    void *context;
    size_t first;
} shifted;

static void run_shifted(void *context, size_t task, size_t thread) {
    shifted *s = context;
    s->fn(s->context, s->first + task, thread);
}

void cv_threads_run(cv_threads *t, size_t n_tasks, cv_task_fn fn, void *context) {
    enum { MOST = 500000 }; /* tasks a generation: leaves room in the 20 bits for claims that find nothing */
    if (t->n == 1 || n_tasks <= 1) {
        for (size_t i = 0; i < n_tasks; i++) fn(context, i, 0);
        return;
    }
    if (n_tasks <= MOST) {
        run_batch(t, n_tasks, fn, context);
        return;
    }
    for (size_t first = 0; first < n_tasks; first += MOST) {
        shifted s = {fn, context, first};
        run_batch(t, n_tasks - first < MOST ? n_tasks - first : MOST, run_shifted, &s);
    }
}
