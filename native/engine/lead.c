/* lead.c — rank 0's compute thread (and the only one of a model on one rank): takes steps from the queue, tells the other ranks,
 * computes its own part, and puts results away. In a pipeline a step goes on in the later stages while the next one is begun; a second
 * thread takes the results.
 */
#include <stdlib.h>
#include <string.h>

#include "engine_state.h"

enum { SMALL_STEP = 8, BOUND_MS = 20000, BOUND_FACTOR = 10, BOUND_MOST_MS = 600000, GOODBYE_MS = 2000 };

/* How long a rank may wait for another one inside a step: what such steps have taken, ten times and 20 s more; ten minutes as long as
 * none has been seen (weights are still read from the disk then). A rank that is dead is noticed sooner, by the transport. */
static uint32_t bound_ms(const cv_engine *e, const cv_job *j) {
    const cv_step *step = cv_job_step(j);
    if (step->timeout_ms) return step->timeout_ms;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < step->n_rows; i++) tokens += cv_job_rows(j)[i].n_tokens;
    uint64_t expected = tokens <= SMALL_STEP ? e->slowest_small : e->slowest_token * tokens;
    if (!expected) return BOUND_MOST_MS;
    uint64_t bound = BOUND_MS + expected / 1000000 * BOUND_FACTOR;
    return bound < BOUND_MOST_MS ? (uint32_t)bound : BOUND_MOST_MS;
}

static void learn(cv_engine *e, uint64_t tokens, uint64_t ns) {
    if (tokens <= SMALL_STEP && ns > e->slowest_small) e->slowest_small = ns;
    if (tokens > SMALL_STEP && ns / tokens > e->slowest_token) e->slowest_token = ns / tokens;
}

static bool asks_for_last(const cv_job *j, const cv_step_row *r) {
    const uint32_t *tokens = (const uint32_t *)(const void *)((const uint8_t *)cv_job_step(j) + r->tokens_offset);
    for (uint32_t i = 0; i < r->n_tokens; i++)
        if (tokens[i] == CV_TOKEN_LAST) return true;
    return false;
}

/* The rows' last tokens, once they are known: waits for steps in flight that sample for the same slots, and for no others. */
static int await_tokens(cv_engine *e, const cv_job *j, cv_err err) {
    cv_queue *q = &e->queue;
    uint32_t *last = cv_job_last(j);
    int code = CV_OK;
    pthread_mutex_lock(&q->lock);
    for (uint32_t i = 0; i < cv_job_step(j)->n_rows; i++) {
        const cv_step_row *r = &cv_job_rows(j)[i];
        last[i] = CV_TOKEN_LAST;
        if (!asks_for_last(j, r)) continue;
        while (e->awaited[r->slot] && !q->over && !atomic_load(&e->stop)) pthread_cond_wait(&q->landed, &q->lock);
        last[i] = e->last[r->slot];
    }
    if (q->over) code = cv_fail(err, q->over, "%s", q->over_text);
    pthread_mutex_unlock(&q->lock);
    if (!code && atomic_load(&e->stop)) code = cv_fail(err, CV_E_ABORTED, "the engine was told to stop");
    return code;
}

/* Remembers what a result sampled. Under the lock. */
static void remember(cv_engine *e, const cv_job *j) {
    const cv_result *result = j->result;
    const cv_result_row *out = (const cv_result_row *)(const void *)((const uint8_t *)j->result + result->rows_offset);
    for (uint32_t i = 0; i < result->n_rows; i++) {
        const cv_step_row *r = &cv_job_rows(j)[i];
        if (r->flags & CV_ROW_SAMPLE) e->last[r->slot] = out[i].status ? CV_TOKEN_LAST : out[i].token;
        else if (out[i].status) e->last[r->slot] = CV_TOKEN_LAST;
    }
}

static void stamp(cv_job *j, uint64_t end) {
    cv_result *r = j->result;
    r->compute_ns = end - j->started_ns;
    r->queued_ns = j->started_ns - j->submitted_ns;
    r->exchange_ns = j->exchange_ns;
    r->mask_ns = j->mask_ns;
}

/* Everything before other ranks hear of the step: an error here is the step's own. */
static int prepare(cv_engine *e, cv_job *j, cv_err err) {
    cv_pass *p = &e->pass;
    int code = await_tokens(e, j, err);
    j->started_ns = cv_now_ns();
    if (!code) code = cv_pass_parse(p, cv_job_step(j), (size_t)j->word->step_size, cv_job_last(j), err);
    if (!code && cv_place_last(&p->place)) code = cv_pass_reserve(p, j->ticket, &j->result, &j->result_size, err);
    return code;
}

/* To the ranks of later stages: behind this stage's work, so that none of them waits for hidden states that are not even begun. */
static int tell_later_stages(cv_engine *e, const cv_job *j, cv_err err) {
    cv_place *place = &e->pass.place;
    int code = CV_OK;
    for (uint32_t stage = 1; !code && stage < place->n_stages; stage++) code = cv_place_send_word(place, stage, j->word, j->word_size);
    return code ? cv_place_failed(place, code, err) : CV_OK;
}

/* Gives the step to the next stage. Its result comes to the results thread, even before this returns, or the group ends. */
static int take_off(cv_engine *e, cv_job *j, cv_err err) {
    pthread_mutex_lock(&e->queue.lock);
    for (uint32_t i = 0; i < cv_job_step(j)->n_rows; i++)
        if (cv_job_rows(j)[i].flags & CV_ROW_SAMPLE) e->awaited[cv_job_rows(j)[i].slot]++;
    pthread_mutex_unlock(&e->queue.lock);
    cv_queue_fly(&e->queue, j);
    return cv_pass_hand_over(&e->pass, err);
}

/* The masks that were made meanwhile, for this rank and those that sample with it. */
static int take_masks(cv_engine *e, cv_job *j, cv_err err) {
    cv_place *place = &e->pass.place;
    if (!j->late.word) return CV_OK;
    int code = cv_queue_await_masks(&e->queue, j, &e->stop, err);
    if (code) return code;
    e->pass.step.late = cv_late_bits(j->late.word);
    j->late.word->ticket = j->ticket;
    if (place->group && (code = cv_place_send_word(place, 0, j->late.word, j->late.word_size))) return cv_place_failed(place, code, err);
    return CV_OK;
}

static void run(cv_engine *e, cv_job *j) {
    cv_pass *p = &e->pass;
    cv_place *place = &p->place;
    char text[CV_TEXT] = "";
    cv_err err = {text, sizeof text};
    int code = prepare(e, j, err);
    if (code) { /* no other rank knows of this step */
        j->code = code;
        memcpy(j->text, text, sizeof j->text);
        cv_queue_done(&e->queue, j);
        return;
    }
    uint64_t exchanged = atomic_load(&place->exchange_ns), tokens = p->step.batch.n_tokens;
    bool ends_here = cv_place_last(place);
    place->timeout_ms = j->word->timeout_ms = bound_ms(e, j);
    if (place->group && (code = cv_place_send_word(place, 0, j->word, j->word_size))) code = cv_place_failed(place, code, err);
    if (!code) code = cv_pass_compute(p, &e->stop, err);
    if (!code) code = take_masks(e, j, err);
    if (!code && ends_here) code = cv_pass_fill(p, j->result, err);
    uint64_t end = cv_now_ns();
    j->exchange_ns = atomic_load(&place->exchange_ns) - exchanged;
    if (!code) learn(e, tokens, end - j->started_ns - j->mask_ns); /* waiting for a grammar says nothing about ranks */
    cv_engine_count(e, code ? 0 : tokens, end - j->started_ns);
    if (!code && !ends_here) code = tell_later_stages(e, j, err);
    bool flies = !code && !ends_here;
    if (flies) code = take_off(e, j, err);
    if (code && place->group) {
        cv_group_abort(place->group, text);
        cv_queue_end(&e->queue, code, text);
    }
    if (flies) return;
    if (code) {
        j->code = code;
        memcpy(j->text, text, sizeof j->text);
    } else {
        stamp(j, end);
        pthread_mutex_lock(&e->queue.lock);
        remember(e, j);
        pthread_mutex_unlock(&e->queue.lock);
    }
    cv_queue_done(&e->queue, j);
}

/* The other ranks may go: nothing is in flight, and nothing comes any more. */
static void say_goodbye(cv_engine *e) {
    cv_place *place = &e->pass.place;
    cv_word word = {.kind = CV_WORD_END};
    place->timeout_ms = GOODBYE_MS;
    int code = CV_OK;
    for (uint32_t stage = 0; !code && stage < place->n_stages; stage++) code = cv_place_send_word(place, stage, &word, sizeof word);
}

void *cv_lead_main(void *engine) {
    cv_engine *e = engine;
    for (cv_job *j; (j = cv_queue_take(&e->queue, &e->stop));) run(e, j);
    if (e->pass.place.group) say_goodbye(e);
    return NULL;
}

/* Waits until a step is in flight. False: there will be none. */
static bool await_flight(cv_engine *e, uint32_t *timeout_ms) {
    cv_queue *q = &e->queue;
    pthread_mutex_lock(&q->lock);
    while (!q->flying && !q->over && !atomic_load(&e->stop)) pthread_cond_wait(&q->landed, &q->lock);
    bool flying = q->flying > 0;
    /* A step waits in every stage for the one before it at most once. */
    uint64_t bound = 0;
    for (cv_job *j = q->first; j; j = j->next)
        if (j->state == CV_JOB_FLYING && j->word->timeout_ms > bound) bound = j->word->timeout_ms;
    pthread_mutex_unlock(&q->lock);
    bound *= e->pass.place.n_stages;
    *timeout_ms = bound < UINT32_MAX ? (uint32_t)bound : UINT32_MAX;
    return flying;
}

/* The result of the oldest step in flight. */
static int land(cv_engine *e, uint64_t ticket, void *result, size_t size, cv_err err) {
    cv_queue *q = &e->queue;
    const cv_result *r = result;
    pthread_mutex_lock(&q->lock);
    cv_job *j = q->first;
    while (j && j->state != CV_JOB_FLYING) j = j->next;
    bool ok = j && j->ticket == ticket && size >= sizeof *r && r->total_size == size && r->n_rows == cv_job_step(j)->n_rows && r->rows_offset == sizeof *r && r->n_rows <= (size - sizeof *r) / sizeof(cv_result_row);
    if (ok) {
        j->result = result;
        j->result_size = size;
        stamp(j, cv_now_ns());
        remember(e, j);
        for (uint32_t i = 0; i < r->n_rows; i++)
            if (cv_job_rows(j)[i].flags & CV_ROW_SAMPLE) e->awaited[cv_job_rows(j)[i].slot]--;
    }
    pthread_mutex_unlock(&q->lock);
    if (!ok) return cv_fail(err, CV_E_GROUP, "the last stage sent a result that belongs to no step");
    cv_queue_done(q, j);
    return CV_OK;
}

void *cv_results_main(void *engine) {
    cv_engine *e = engine;
    char text[CV_TEXT] = "";
    cv_err err = {text, sizeof text};
    for (uint32_t timeout_ms; await_flight(e, &timeout_ms);) {
        uint64_t ticket;
        void *result = NULL;
        size_t size;
        int code = cv_place_receive_result(&e->pass.place, &ticket, &result, &size, timeout_ms, err);
        if (!code && (code = land(e, ticket, result, size, err))) free(result);
        if (!code) continue;
        cv_group_abort(e->pass.place.group, text);
        cv_queue_end(&e->queue, code, text);
    }
    return NULL;
}
