/* queue.c — see queue.h. */
#include "queue.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* How long a step waits for its masks. In whole waits, so that a process that was stopped for a while does not count it as waiting. */
enum { MASK_WAITS = 30, MASK_WAIT_S = 1 };

uint64_t cv_now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int cv_queue_open(cv_queue *q, cv_err err) {
    *q = (cv_queue){.next_ticket = 1, .event = {-1, -1}};
    if (pthread_mutex_init(&q->lock, NULL) || pthread_cond_init(&q->work, NULL) || pthread_cond_init(&q->landed, NULL)) return cv_fail(err, CV_E_MEMORY, "cannot make a lock");
    q->ready = true;
    if (pipe(q->event)) return cv_fail(err, CV_E_IO, "cannot make a pipe: %s", strerror(errno));
    for (int i = 0; i < 2; i++) {
        fcntl(q->event[i], F_SETFD, FD_CLOEXEC);
        fcntl(q->event[i], F_SETFL, O_NONBLOCK);
    }
    return CV_OK;
}

void cv_queue_close(cv_queue *q) {
    if (!q->ready) return;
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->work);
    pthread_cond_destroy(&q->landed);
    for (cv_job *j = q->first, *next; j; j = next) {
        next = j->next;
        cv_job_free(j);
    }
    for (int i = 0; i < 2; i++)
        if (q->event[i] >= 0) close(q->event[i]);
    q->ready = false;
}

cv_job *cv_job_new(const void *step, size_t size, uint32_t n_rows) {
    cv_job *j = calloc(1, sizeof *j);
    void *word = NULL;
    if (!j || size > SIZE_MAX / 2 || posix_memalign(&word, 64, sizeof(cv_word) + size + n_rows * sizeof(uint32_t))) {
        free(j);
        return NULL;
    }
    *j = (cv_job){.word = word, .word_size = sizeof(cv_word) + size + n_rows * sizeof(uint32_t), .submitted_ns = cv_now_ns()};
    *j->word = (cv_word){.kind = CV_WORD_STEP, .step_size = size, .n_rows = n_rows};
    memcpy(j->word + 1, step, size);
    return j;
}

void cv_job_free(cv_job *j) {
    if (!j) return;
    free(j->word);
    free(j->result);
    cv_late_close(&j->late);
    free(j);
}

int cv_queue_add(cv_queue *q, cv_job *j, uint64_t *ticket, cv_err err) {
    int code = CV_OK;
    pthread_mutex_lock(&q->lock);
    if (q->over) code = cv_fail(err, q->over, "%s", q->over_text);
    else if (q->open >= CV_QUEUE_MOST) code = cv_fail(err, CV_E_BUSY, "%d steps are waiting already", CV_QUEUE_MOST);
    if (!code) {
        *ticket = j->ticket = j->word->ticket = q->next_ticket++;
        if (q->tail) q->tail->next = j;
        else q->first = j;
        q->tail = j;
        q->open++;
        pthread_cond_signal(&q->work);
    }
    pthread_mutex_unlock(&q->lock);
    return code;
}

cv_job *cv_queue_take(cv_queue *q, const atomic_bool *stop) {
    cv_job *j;
    pthread_mutex_lock(&q->lock);
    for (;;) {
        for (j = q->first; j && j->state != CV_JOB_WAITING;) j = j->next;
        if (j || atomic_load(stop)) break;
        pthread_cond_wait(&q->work, &q->lock);
    }
    if (j) j->state = CV_JOB_RUNNING;
    pthread_mutex_unlock(&q->lock);
    return j;
}

/* A full pipe means that nobody reads; the reader finds the result at its next collect all the same. */
void cv_queue_ring(cv_queue *q) {
    char byte = 1;
    while (write(q->event[1], &byte, 1) < 0 && errno == EINTR) continue;
}

/* Under the lock. A job may be collected as soon as it is done. Gives how often the caller has to ring once the lock is open: a compute thread
 * that waits for the job wakes first and is not in the way of the control thread. */
static unsigned done(cv_queue *q, cv_job *j) {
    unsigned rings = 0;
    free(j->word);
    j->word = NULL;
    cv_late_close(&j->late);
    if (j->state == CV_JOB_FLYING) q->flying--;
    j->state = CV_JOB_DONE;
    q->open--;
    for (cv_job *k = q->first; k && k->state == CV_JOB_DONE; k = k->next)
        if (!k->announced) {
            k->announced = true;
            rings++;
        }
    pthread_cond_broadcast(&q->landed);
    return rings;
}

void cv_queue_fly(cv_queue *q, cv_job *j) {
    pthread_mutex_lock(&q->lock);
    j->state = CV_JOB_FLYING;
    q->flying++;
    pthread_cond_broadcast(&q->landed);
    pthread_mutex_unlock(&q->lock);
}

void cv_queue_done(cv_queue *q, cv_job *j) {
    pthread_mutex_lock(&q->lock);
    unsigned rings = done(q, j);
    pthread_mutex_unlock(&q->lock);
    for (; rings; rings--) cv_queue_ring(q);
}

void cv_queue_end(cv_queue *q, int code, const char *text) {
    unsigned rings = 0;
    pthread_mutex_lock(&q->lock);
    if (!q->over) {
        q->over = code;
        snprintf(q->over_text, sizeof q->over_text, "%s", text);
    }
    for (cv_job *j = q->first; j; j = j->next) {
        if (j->state != CV_JOB_FLYING) continue;
        j->code = q->over;
        snprintf(j->text, sizeof j->text, "%s", q->over_text);
        rings += done(q, j);
    }
    pthread_cond_broadcast(&q->work);
    pthread_cond_broadcast(&q->landed);
    pthread_mutex_unlock(&q->lock);
    for (; rings; rings--) cv_queue_ring(q);
}

void cv_queue_wake(cv_queue *q) {
    pthread_mutex_lock(&q->lock);
    pthread_cond_broadcast(&q->work);
    pthread_cond_broadcast(&q->landed);
    pthread_mutex_unlock(&q->lock);
}

int cv_queue_give_masks(cv_queue *q, uint64_t ticket, size_t vocab, size_t row, const void *masks, size_t size, cv_err err) {
    int code = CV_OK;
    pthread_mutex_lock(&q->lock);
    cv_job *j = q->first;
    while (j && j->ticket != ticket) j = j->next;
    if (!j) {
        code = cv_fail(err, CV_E_ARGUMENT, "no ticket %llu", (unsigned long long)ticket);
    } else if (j->state != CV_JOB_DONE) {
        code = cv_late_give(&j->late, cv_job_rows(j), j->word->n_rows, vocab, row, masks, size, err);
        if (!code && !j->late.missing) pthread_cond_broadcast(&q->landed);
    }
    pthread_mutex_unlock(&q->lock);
    return code;
}

int cv_queue_await_masks(cv_queue *q, cv_job *j, const atomic_bool *stop, cv_err err) {
    if (!j->late.word) return CV_OK;
    uint64_t start = cv_now_ns();
    int code = CV_OK, waits = 0;
    pthread_mutex_lock(&q->lock);
    while (j->late.missing && !q->over && !atomic_load(stop) && waits < MASK_WAITS) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += MASK_WAIT_S;
        waits += pthread_cond_timedwait(&q->landed, &q->lock, &until) == ETIMEDOUT;
    }
    if (q->over) code = cv_fail(err, q->over, "%s", q->over_text);
    else if (j->late.missing && atomic_load(stop)) code = cv_fail(err, CV_E_ABORTED, "the engine was told to stop");
    else if (j->late.missing) code = cv_fail(err, CV_E_ARGUMENT, "the masks of %zu rows did not come", j->late.missing);
    pthread_mutex_unlock(&q->lock);
    j->mask_ns = cv_now_ns() - start;
    return code;
}

int cv_queue_collect(cv_queue *q, uint64_t ticket, void *out, size_t capacity, uint64_t *out_size, cv_err err) {
    pthread_mutex_lock(&q->lock);
    cv_job *before = NULL, *j = q->first;
    while (j && j->ticket != ticket) {
        before = j;
        j = j->next;
    }
    int code = CV_OK;
    if (!j) code = cv_fail(err, CV_E_ARGUMENT, "no ticket %llu", (unsigned long long)ticket);
    else if (j->state != CV_JOB_DONE) code = CV_E_AGAIN;
    else if (!j->code && j->result_size > capacity) {
        *out_size = j->result_size;
        code = CV_E_BUFFER;
    }
    if (!code) {
        if (before) before->next = j->next;
        else q->first = j->next;
        if (q->tail == j) q->tail = before;
    }
    pthread_mutex_unlock(&q->lock);
    if (code) return code;
    code = j->code;
    if (code) cv_fail(err, code, "%s", j->text);
    else if (out) {
        memcpy(out, j->result, j->result_size);
        *out_size = j->result_size;
    }
    cv_job_free(j);
    return code;
}
