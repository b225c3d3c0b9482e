/* engine.c — the public interface: opening an engine, steps in, results out. What its compute thread does is in lead.c and follow.c. */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "engine_state.h"

uint32_t cv_abi(void) { return CV_ABI_VERSION; }

int cv_event_fd(cv_engine *engine) { return engine ? engine->queue.event[0] : CV_E_ARGUMENT; }

static int open_tables(cv_engine *e, cv_err err) {
    const cv_model *m = e->pass.model;
    e->last = malloc(m->n_slots * sizeof *e->last);
    e->awaited = calloc(m->n_slots, sizeof *e->awaited);
    for (size_t i = 0; e->last && i < m->n_slots; i++) e->last[i] = CV_TOKEN_LAST;
    if (!e->last || !e->awaited || cv_step_open(m, &e->checked)) return cv_fail(err, CV_E_MEMORY, "no memory for step tables");
    return CV_OK;
}

static int start_threads(cv_engine *e, cv_err err) {
    e->compute_started = !pthread_create(&e->compute, NULL, e->follows ? cv_follow_main : cv_lead_main, e);
    if (e->compute_started && !e->follows && e->pass.place.n_stages > 1) {
        e->results_started = !pthread_create(&e->results, NULL, cv_results_main, e);
        if (!e->results_started) return cv_fail(err, CV_E_MEMORY, "cannot start the results thread");
    }
    return e->compute_started ? CV_OK : cv_fail(err, CV_E_MEMORY, "cannot start the compute thread");
}

int cv_engine_open(const void *plan, size_t plan_size, cv_group *group, cv_load_progress *progress, cv_engine **out, cv_err err) {
    if (!out) return cv_fail(err, CV_E_ARGUMENT, "nowhere to put the engine");
    cv_engine *e = calloc(1, sizeof *e);
    if (!e) return cv_fail(err, CV_E_MEMORY, "no memory");
    int code = cv_pass_open(plan, plan_size, group, progress, &e->pass, err);
    if (!code) code = cv_queue_open(&e->queue, err);
    if (!code) code = open_tables(e, err);
    if (!code) {
        const cv_model *m = e->pass.model;
        uint32_t best = cv_cpu_best(), level = m->shape.cpu_level;
        e->follows = e->pass.place.rank > 0;
        e->stats = (cv_stats_record){.weights_mapped = cv_weights_mapped_bytes(m->weights), .weights_copied = cv_weights_copied_bytes(m->weights), .kv_bytes = m->pools[0].bytes + m->pools[1].bytes,
                                     .scratch_bytes = e->pass.act.bytes + e->pass.backend->scratch_bytes + 3 * m->shape.vocab * sizeof(float), .n_threads = m->shape.n_threads, .cpu_level = best < level || !level ? best : level};
        code = start_threads(e, err);
    }
    if (code) {
        cv_close(e);
        return code;
    }
    *out = e;
    return CV_OK;
}

void cv_engine_count(cv_engine *e, uint64_t tokens, uint64_t compute_ns) {
    pthread_mutex_lock(&e->queue.lock);
    e->stats.steps++;
    e->stats.tokens += tokens;
    e->stats.compute_ns += compute_ns;
    e->stats.kernel_ns = e->pass.kernel_ns;
    e->stats.exchange_ns = atomic_load(&e->pass.place.exchange_ns);
    e->stats.rank_checks = atomic_load(&e->pass.place.checks);
    pthread_mutex_unlock(&e->queue.lock);
}

int cv_follow_state(cv_engine *e, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!e || !e->follows) return cv_fail(err, CV_E_ARGUMENT, "this engine follows nobody");
    pthread_mutex_lock(&e->queue.lock);
    int code = e->followed ? e->follow_code : CV_E_AGAIN;
    if (e->followed && code) cv_fail(err, code, "%s", e->follow_text);
    pthread_mutex_unlock(&e->queue.lock);
    return code;
}

int cv_submit(cv_engine *e, const void *step, size_t size, uint64_t *ticket, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!e || !step || !ticket || size < sizeof(cv_step)) return cv_fail(err, CV_E_ARGUMENT, "no engine or no step");
    if (e->follows) return cv_fail(err, CV_E_ARGUMENT, "rank %u follows rank 0: steps are submitted there", e->pass.place.rank);
    if (atomic_load(&e->stop)) return cv_fail(err, CV_E_ABORTED, "the engine was told to stop");
    uint32_t n_rows = ((const cv_step *)step)->n_rows;
    cv_job *j = n_rows <= e->pass.model->max_rows ? cv_job_new(step, size, n_rows) : NULL;
    if (!j && n_rows > e->pass.model->max_rows) return cv_fail(err, CV_E_ARGUMENT, "%u rows, a step takes 1 to %zu", n_rows, e->pass.model->max_rows);
    if (!j) return cv_fail(err, CV_E_MEMORY, "no memory for a step of %zu bytes", size);
    /* Checked here, so that a caller's mistake is an error of the call and not of a later ticket. */
    int code = cv_step_parse(e->pass.model, cv_job_step(j), size, NULL, &e->checked, err);
    if (!code && e->checked.n_late && e->pass.place.n_stages > 1) code = cv_fail(err, CV_E_ARGUMENT, "in a pipeline masks come with their step");
    if (!code && cv_late_open(&j->late, &e->checked)) code = cv_fail(err, CV_E_MEMORY, "no memory for %zu masks", e->checked.n_late);
    if (!code) code = cv_queue_add(&e->queue, j, ticket, err);
    if (code) cv_job_free(j);
    return code;
}

int cv_give_masks(cv_engine *e, uint64_t ticket, uint32_t row, const void *masks, size_t size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!e) return cv_fail(err, CV_E_ARGUMENT, "no engine");
    return cv_queue_give_masks(&e->queue, ticket, e->pass.model->shape.vocab, row, masks, size, err);
}

int cv_collect(cv_engine *e, uint64_t ticket, void *out, size_t capacity, uint64_t *out_size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!e || !out_size) return cv_fail(err, CV_E_ARGUMENT, "no engine");
    return cv_queue_collect(&e->queue, ticket, out, capacity, out_size, err);
}

void cv_abort(cv_engine *e) {
    if (!e) return;
    atomic_store(&e->stop, true);
    pthread_mutex_lock(&e->queue.lock);
    bool busy = e->follows ? !e->followed : e->queue.open > 0;
    pthread_mutex_unlock(&e->queue.lock);
    /* Ranks that wait for this one must not wait in vain, nor this one for them. */
    if (busy && e->pass.place.group) cv_group_abort(e->pass.place.group, e->follows ? "a rank that follows was told to stop" : "rank 0 was told to stop while steps were computed");
    cv_queue_wake(&e->queue);
}

int cv_stats(cv_engine *e, cv_stats_record *out) {
    if (!e || !out) return CV_E_ARGUMENT;
    pthread_mutex_lock(&e->queue.lock);
    *out = e->stats;
    pthread_mutex_unlock(&e->queue.lock);
    return CV_OK;
}

void cv_close(cv_engine *e) {
    if (!e) return;
    if (e->compute_started || e->results_started) cv_abort(e);
    if (e->compute_started) pthread_join(e->compute, NULL);
    if (e->results_started) pthread_join(e->results, NULL);
    cv_queue_close(&e->queue);
    cv_pass_close(&e->pass);
    cv_step_close(&e->checked);
    free(e->last);
    free(e->awaited);
    free(e);
}
