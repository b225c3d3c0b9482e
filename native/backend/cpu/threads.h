/* threads.h — a fixed pool of compute threads. The caller of cv_threads_run is one of them.
 *
 * Between runs the workers spin for a few tens of microseconds (the next operation usually follows at once) and then sleep,
 * so an idle engine costs nothing. Tasks are claimed from a shared counter: a thread that the system slows down simply
 * takes fewer.
 */
#ifndef CV_THREADS_H
#define CV_THREADS_H

#include <stddef.h>

typedef struct cv_threads cv_threads;

/* task: 0 … n_tasks-1; thread: 0 … n_threads-1 (for per-thread scratch). */
typedef void (*cv_task_fn)(void *context, size_t task, size_t thread);

/* NULL when a thread or memory is not to be had. */
cv_threads *cv_threads_open(size_t n_threads);
void cv_threads_close(cv_threads *t);
size_t cv_threads_count(const cv_threads *t);

/* Memory that threads ask the cache for while they have nothing to do, until the next call: the first bytes of what the run
 * after this one will read. It changes nothing but time. At most CV_THREADS_AHEAD ranges count. */
enum { CV_THREADS_AHEAD = 4 };
typedef struct {
    const void *data;
    size_t bytes;
} cv_threads_range;
void cv_threads_read_ahead(cv_threads *t, const cv_threads_range *ranges, size_t n);

/* Runs all tasks and returns when every one has ended. One caller at a time. */
void cv_threads_run(cv_threads *t, size_t n_tasks, cv_task_fn fn, void *context);

#endif
