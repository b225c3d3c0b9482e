/* queue.h — steps from their submission until their result is collected. States of a job: waiting, running (the compute thread's),
 * flying (in later stages of the pipeline), done (result or error kept until collected). The event descriptor gets a byte for each
 * job that is done, in the order of submission whatever the order in which they end. */
#ifndef CV_QUEUE_H
#define CV_QUEUE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "error.h"
#include "late_masks.h"
#include "place.h"

enum { CV_QUEUE_MOST = 64, CV_TEXT = 768 };

typedef enum { CV_JOB_WAITING, CV_JOB_RUNNING, CV_JOB_FLYING, CV_JOB_DONE } cv_job_state;

typedef struct cv_job {
    uint64_t ticket, submitted_ns, started_ns, exchange_ns, mask_ns;
    /* What the other ranks receive: the header, step_size bytes of the descriptor, the rows' last tokens. */
    cv_word *word;
    size_t word_size;
    cv_late_masks late;
    void *result;
    size_t result_size;
    cv_job_state state;
    bool announced;
    int code;
    char text[CV_TEXT];
    struct cv_job *next;
} cv_job;

static inline cv_step *cv_job_step(const cv_job *j) { return (cv_step *)(void *)(j->word + 1); }
static inline const cv_step_row *cv_job_rows(const cv_job *j) { return (const cv_step_row *)(const void *)((const uint8_t *)(j->word + 1) + cv_job_step(j)->rows_offset); }
static inline uint32_t *cv_job_last(const cv_job *j) { return (uint32_t *)(void *)((uint8_t *)(j->word + 1) + j->word->step_size); }

typedef struct {
    pthread_mutex_t lock; /* guards everything here and the engine's shared numbers */
    pthread_cond_t work;   /* a job waits, or it is over */
    pthread_cond_t landed; /* a job in flight has ended, one has taken off, a job's last mask has come, or it is over */
    bool ready;            /* the three above are made */
    cv_job *first, *tail;  /* all tickets not yet collected, oldest first */
    size_t open;           /* jobs that are not done */
    size_t flying;
    uint64_t next_ticket;
    int event[2];
    int over; /* why no job will be computed any more; 0 = going on */
    char over_text[CV_TEXT];
} cv_queue;

uint64_t cv_now_ns(void);

int cv_queue_open(cv_queue *q, cv_err err);
void cv_queue_close(cv_queue *q);

/* A job for a step's bytes (copied); NULL: no memory. Give it to cv_queue_add or cv_job_free. n_rows: of the step. */
cv_job *cv_job_new(const void *step, size_t size, uint32_t n_rows);
void cv_job_free(cv_job *j);

/* CV_E_BUSY when full, the queue's own code when it is over. */
int cv_queue_add(cv_queue *q, cv_job *j, uint64_t *ticket, cv_err err);

/* The next waiting job, now running; blocks. NULL when *stop is set and none waits. */
cv_job *cv_queue_take(cv_queue *q, const atomic_bool *stop);
/* A running job goes on in later stages. */
void cv_queue_fly(cv_queue *q, cv_job *j);
/* A job is done, with j->code and j->text or a result. */
void cv_queue_done(cv_queue *q, cv_job *j);
/* Nothing will be computed any more: jobs in flight end with the code, waiting ones when they are taken. The first reason stays. */
void cv_queue_end(cv_queue *q, int code, const char *text);
/* Wakes whoever waits, to look at their stop flag. */
void cv_queue_wake(cv_queue *q);

/* Masks of a row of a job: cv_late_give. Nothing for a job that is done. CV_E_ARGUMENT: no such ticket. */
int cv_queue_give_masks(cv_queue *q, uint64_t ticket, size_t vocab, size_t row, const void *masks, size_t size, cv_err err);
/* Waits until a job's masks are there; the queue's code when it is over, CV_E_ABORTED when *stop is set, CV_E_ARGUMENT when they do not come. */
int cv_queue_await_masks(cv_queue *q, cv_job *j, const atomic_bool *stop, cv_err err);

int cv_queue_collect(cv_queue *q, uint64_t ticket, void *out, size_t capacity, uint64_t *out_size, cv_err err);

/* A byte for whoever polls the event descriptor. */
void cv_queue_ring(cv_queue *q);

#endif
