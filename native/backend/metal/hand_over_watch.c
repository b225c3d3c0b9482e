/* hand_over_watch.c — a thread that lets a GPU go on which waits for an event, when the host is late: a system may end commands that wait
 * long, and with them more than this step. (A kernel that looks at a word counts its looks instead.) */
#include <stdlib.h>
#include <time.h>

#include "device_state.h"

enum { TICK_NS = 5 * 1000 * 1000, IDLE_TICKS = 40 };

struct cv_metal_watch {
    cv_metal_device *d;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool watching, passed, stop;
    unsigned idle;           /* ticks since the host did its part */
    uint64_t until_ns, last; /* UINT64_MAX: nothing to end */
};

static void *watch_main(void *arg) {
    cv_metal_watch *w = arg;
    cv_metal_device *d = w->d;
    void *pool = d->objc.pool_push();
    pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        if (!w->watching) {
            pthread_cond_wait(&w->changed, &w->lock);
            continue;
        }
        if (cv_metal_now_ns() >= w->until_ns) {
            w->passed = true;
            w->watching = false;
            CV_SEND(&d->objc, void, d->hand_overs.releases, set_signaled, (uint64_t), w->last);
            continue;
        }
        w->idle = w->until_ns == UINT64_MAX ? w->idle + 1 : 0;
        if (w->idle > IDLE_TICKS) {
            w->watching = false;
            continue;
        }
        struct timespec next;
        clock_gettime(CLOCK_REALTIME, &next);
        next.tv_nsec += TICK_NS;
        next.tv_sec += next.tv_nsec / 1000000000;
        next.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&w->changed, &w->lock, &next);
    }
    pthread_mutex_unlock(&w->lock);
    d->objc.pool_pop(pool);
    return NULL;
}

cv_metal_watch *cv_metal_watch_open(cv_metal_device *d) {
    cv_metal_watch *w = calloc(1, sizeof *w);
    if (!w) return NULL;
    w->d = d;
    bool lock = !pthread_mutex_init(&w->lock, NULL), changed = lock && !pthread_cond_init(&w->changed, NULL);
    if (changed && !pthread_create(&w->thread, NULL, watch_main, w)) return w;
    if (changed) pthread_cond_destroy(&w->changed);
    if (lock) pthread_mutex_destroy(&w->lock);
    free(w);
    return NULL;
}

void cv_metal_watch_close(cv_metal_watch *w) {
    if (!w) return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

/* The thread ticks while it watches, so that most hand-overs need not wake it. */
void cv_metal_watch_start(cv_metal_watch *w, uint64_t last, uint64_t patience_ns) {
    pthread_mutex_lock(&w->lock);
    bool asleep = !w->watching;
    w->until_ns = cv_metal_now_ns() + patience_ns;
    w->last = last;
    w->passed = false;
    w->watching = true;
    w->idle = 0;
    if (asleep) pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

bool cv_metal_watch_stop(cv_metal_watch *w) {
    pthread_mutex_lock(&w->lock);
    bool in_time = !w->passed;
    w->until_ns = UINT64_MAX;
    pthread_mutex_unlock(&w->lock);
    return in_time;
}
