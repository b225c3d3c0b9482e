/* engine_state.h — an open engine, as its threads share it. Rank 0 (and a rank alone) leads: lead.c; the others follow: follow.c. */
#ifndef CV_ENGINE_STATE_H
#define CV_ENGINE_STATE_H

#include "pass.h"
#include "queue.h"

struct cv_engine {
    cv_pass pass;           /* compute thread's */
    cv_parsed_step checked; /* control thread's */
    cv_queue queue;
    atomic_bool stop;
    pthread_t compute, results; /* results: of rank 0 of a pipeline */
    bool compute_started, results_started;
    bool follows;
    /* Under the queue's lock. */
    cv_stats_record stats;
    uint32_t *last;     /* [n_slots] last sampled tokens, CV_TOKEN_LAST: none */
    uint32_t *awaited;  /* [n_slots] steps in flight that sample for the slot */
    bool followed;      /* following has ended, with: */
    int follow_code;
    char follow_text[CV_TEXT];
    /* Compute thread: what steps took at most, for deadlines. Nanoseconds; 0 = not seen yet. */
    uint64_t slowest_small, slowest_token;
};

/* Thread functions; argument: the engine. */
void *cv_lead_main(void *engine);
void *cv_results_main(void *engine);
void *cv_follow_main(void *engine);

/* Counts a step that has been computed here. */
void cv_engine_count(cv_engine *e, uint64_t tokens, uint64_t compute_ns);

#endif
