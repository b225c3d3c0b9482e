/* engine.c — the public interface: a queue of steps, the compute thread that runs them in order, their results.
 *
 * States of a ticket: waiting in the queue, running, done (result or error kept until collected). One lock guards the
 * queue; the compute thread holds it only to take a step and to put its result away.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../backend/metal/metal.h"
#include "engine.h"
#include "graph.h"
#include "sampler.h"
#include "step.h"

enum { QUEUE = 64, TEXT = 256 };

typedef struct job {
    uint64_t ticket;
    void *step;
    size_t step_size;
    void *result;
    size_t result_size;
    int code;
    bool done;
    char text[TEXT];
    uint64_t submitted_ns;
    struct job *next;
} job;

struct cv_engine {
    cv_model *model;
    cv_backend *backend;
    cv_activations act;
    cv_parsed_step parsed, checked; /* compute thread's; control thread's */
    cv_sampler_scratch sampler;
    uint32_t *last; /* [n_slots] last sampled tokens, compute thread only */
    pthread_t thread;
    bool thread_started, lock_ready;
    pthread_mutex_t lock;
    pthread_cond_t work;
    job *first, *tail; /* all tickets not yet collected, oldest first */
    size_t waiting;
    uint64_t next_ticket;
    atomic_bool stop;
    int event[2];
    cv_stats_record stats; /* under lock */
};

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint32_t cv_abi(void) { return CV_ABI_VERSION; }

static void free_job(job *j) {
    if (!j) return;
    free(j->step);
    free(j->result);
    free(j);
}

static void copy_pages(cv_model *m, const cv_parsed_step *s) {
    for (size_t i = 0; i < s->head->n_copies; i++) {
        const cv_step_copy *c = &s->copies[i];
        cv_kv_pool *p = &m->pools[c->pool];
        if (c->from != c->to) memcpy((char *)p->memory + c->to * p->page_bytes, (char *)p->memory + c->from * p->page_bytes, p->page_bytes);
    }
}

/* Entries of a row's table of alternatives, or of samples. */
static size_t top_entries(const cv_step_row *r) { return r->flags & CV_ROW_SAMPLE_ALL ? r->n_tokens : r->n_top_logprobs; }

/* Lays out the result: rows, then alternatives, then logits. */
static int make_result(const cv_engine *e, const cv_parsed_step *s, job *j) {
    size_t n = s->head->n_rows, at = sizeof(cv_result) + n * sizeof(cv_result_row), vocab = e->model->shape.vocab;
    for (size_t i = 0; i < n; i++) at += top_entries(&s->rows[i]) * sizeof(cv_result_top);
    for (size_t i = 0; i < n; i++)
        if (s->rows[i].flags & CV_ROW_RETURN_LOGITS) at += (s->first_logit[i + 1] - s->first_logit[i]) * vocab * sizeof(float);
    j->result = calloc(1, at);
    if (!j->result) return CV_E_MEMORY;
    j->result_size = at;
    cv_result *r = j->result;
    *r = (cv_result){.ticket = j->ticket, .total_size = at, .n_rows = (uint32_t)n, .rows_offset = sizeof(cv_result)};
    return CV_OK;
}

static int fill_result(cv_engine *e, const cv_parsed_step *s, job *j, cv_err err) {
    uint8_t *base = j->result;
    size_t n = s->head->n_rows, vocab = e->model->shape.vocab, at = sizeof(cv_result) + n * sizeof(cv_result_row);
    cv_result_row *rows = (cv_result_row *)(void *)(base + sizeof(cv_result));
    for (size_t i = 0; i < n; i++) {
        const cv_step_row *r = &s->rows[i];
        rows[i] = (cv_result_row){.token = CV_TOKEN_LAST, .top_offset = at};
        cv_result_top *top = (cv_result_top *)(void *)(base + at);
        at += top_entries(r) * sizeof(cv_result_top);
        if (!(r->flags & CV_ROW_SAMPLE)) continue;
        uint32_t first = r->flags & CV_ROW_SAMPLE_ALL ? 0 : r->n_tokens - 1;
        for (uint32_t t = first; t < r->n_tokens; t++) {
            const float *logits = e->act.logits + (s->first_logit[i + 1] - (r->n_tokens - t)) * vocab;
            int code = cv_sample(s->head, r, logits, vocab, r->first_position + t + 1, &e->sampler, &rows[i], top, err);
            if (code) return code;
            if (r->flags & CV_ROW_SAMPLE_ALL) top[t] = (cv_result_top){rows[i].token, rows[i].logprob};
        }
        if (r->flags & CV_ROW_SAMPLE_ALL) rows[i].n_top = r->n_tokens;
        e->last[r->slot] = rows[i].token;
    }
    for (size_t i = 0; i < n; i++) {
        if (!(s->rows[i].flags & CV_ROW_RETURN_LOGITS)) continue;
        size_t count = s->first_logit[i + 1] - s->first_logit[i];
        rows[i].n_logits = (uint32_t)count;
        rows[i].logits_offset = at;
        memcpy(base + at, e->act.logits + s->first_logit[i] * vocab, count * vocab * sizeof(float));
        at += count * vocab * sizeof(float);
    }
    return CV_OK;
}

static void run(cv_engine *e, job *j) {
    cv_err err = {j->text, sizeof j->text};
    uint64_t start = now_ns(), kernel_ns = 0;
    cv_parsed_step *s = &e->parsed;
    j->code = atomic_load(&e->stop) ? cv_fail(err, CV_E_ABORTED, "the engine was told to stop") : cv_step_parse(e->model, j->step, j->step_size, e->last, s, err);
    if (!j->code && make_result(e, s, j)) j->code = cv_fail(err, CV_E_MEMORY, "no memory for the step's result");
    if (!j->code) copy_pages(e->model, s);
    if (!j->code) j->code = cv_graph_run(e->model, e->backend, &e->act, &s->batch, s->logit_rows, s->n_logits, &e->stop, &kernel_ns, err);
    if (!j->code) j->code = fill_result(e, s, j, err);
    uint64_t end = now_ns();
    if (!j->code) {
        cv_result *r = j->result;
        r->compute_ns = end - start;
        r->queued_ns = start - j->submitted_ns;
    }
    pthread_mutex_lock(&e->lock);
    e->stats.steps++;
    e->stats.tokens += j->code ? 0 : s->batch.n_tokens;
    e->stats.compute_ns += end - start;
    e->stats.kernel_ns += kernel_ns;
    pthread_mutex_unlock(&e->lock);
}

static void *compute_main(void *arg) {
    cv_engine *e = arg;
    for (;;) {
        pthread_mutex_lock(&e->lock);
        job *j;
        for (;;) {
            for (j = e->first; j && j->done;) j = j->next;
            if (j || (atomic_load(&e->stop) && !j)) break;
            pthread_cond_wait(&e->work, &e->lock);
        }
        pthread_mutex_unlock(&e->lock);
        if (!j) return NULL;
        run(e, j);
        pthread_mutex_lock(&e->lock);
        free(j->step);
        j->step = NULL;
        j->done = true;
        e->waiting--;
        pthread_mutex_unlock(&e->lock);
        /* A full pipe means that nobody reads; the reader finds the result at its next collect all the same. */
        char byte = 1;
        while (write(e->event[1], &byte, 1) < 0 && errno == EINTR) continue;
    }
}

static int open_backend(cv_model *m, uint32_t device, cv_backend **out, cv_err err) {
    if (device != CV_DEVICE_METAL) return cv_backend_cpu_open(&m->shape, out, err.text, err.size);
    const cv_metal_memory pools[2] = {{m->pools[0].memory, m->pools[0].bytes}, {m->pools[1].memory, m->pools[1].bytes}};
    return cv_backend_metal_open(&m->shape, pools, 2, out, err.text, err.size);
}

int cv_event_fd(cv_engine *engine) { return engine ? engine->event[0] : CV_E_ARGUMENT; }

int cv_engine_open(const void *plan, size_t plan_size, cv_group *group, cv_load_progress *progress, cv_engine **out, cv_err err) {
    if (group) return cv_fail(err, CV_E_UNSUPPORTED, "this build computes on one rank only");
    if (!out) return cv_fail(err, CV_E_ARGUMENT, "nowhere to put the engine");
    cv_engine *e = calloc(1, sizeof *e);
    if (!e) return cv_fail(err, CV_E_MEMORY, "no memory");
    e->event[0] = e->event[1] = -1;
    e->next_ticket = 1;
    int code = cv_model_open(plan, plan_size, progress, &e->model, err);
    if (!code) code = open_backend(e->model, ((const cv_plan *)plan)->device, &e->backend, err);
    if (!code) code = cv_graph_open(e->model, e->backend, &e->act, err);
    if (!code) {
        e->last = malloc(e->model->n_slots * sizeof *e->last);
        for (size_t i = 0; e->last && i < e->model->n_slots; i++) e->last[i] = CV_TOKEN_LAST;
        if (!e->last || cv_step_open(e->model, &e->parsed) || cv_step_open(e->model, &e->checked) || cv_sampler_open(e->model->shape.vocab, &e->sampler))
            code = cv_fail(err, CV_E_MEMORY, "no memory for step tables");
    }
    if (!code && pipe(e->event)) code = cv_fail(err, CV_E_IO, "cannot make a pipe: %s", strerror(errno));
    if (!code) {
        for (int i = 0; i < 2; i++) {
            fcntl(e->event[i], F_SETFD, FD_CLOEXEC);
            fcntl(e->event[i], F_SETFL, O_NONBLOCK);
        }
        e->lock_ready = !pthread_mutex_init(&e->lock, NULL) && !pthread_cond_init(&e->work, NULL);
        e->thread_started = e->lock_ready && !pthread_create(&e->thread, NULL, compute_main, e);
        if (!e->thread_started) code = cv_fail(err, CV_E_MEMORY, "cannot start the compute thread");
    }
    if (code) {
        cv_close(e);
        return code;
    }
    const cv_kv_pool *pools = e->model->pools;
    e->stats = (cv_stats_record){.weights_mapped = cv_weights_mapped_bytes(e->model->weights), .weights_copied = cv_weights_copied_bytes(e->model->weights),
                                 .kv_bytes = pools[0].bytes + pools[1].bytes, .scratch_bytes = e->act.bytes, .n_threads = e->model->shape.n_threads,
                                 .cpu_level = cv_cpu_best() < e->model->shape.cpu_level || !e->model->shape.cpu_level ? cv_cpu_best() : e->model->shape.cpu_level};
    *out = e;
    return CV_OK;
}

int cv_follow_state(cv_engine *e, char *text, size_t text_size) {
    (void)e;
    return cv_fail((cv_err){text, text_size}, CV_E_ARGUMENT, "this engine follows nobody");
}

int cv_submit(cv_engine *e, const void *step, size_t size, uint64_t *ticket, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!e || !step || !ticket || size < sizeof(cv_step)) return cv_fail(err, CV_E_ARGUMENT, "no engine or no step");
    if (atomic_load(&e->stop)) return cv_fail(err, CV_E_ABORTED, "the engine was told to stop");
    job *j = calloc(1, sizeof *j);
    void *copy = NULL;
    if (!j || posix_memalign(&copy, 64, size)) {
        free(j);
        return cv_fail(err, CV_E_MEMORY, "no memory for a step of %zu bytes", size);
    }
    memcpy(copy, step, size);
    /* Checked here, so that a caller's mistake is an error of the call and not of a later ticket. */
    int code = cv_step_parse(e->model, copy, size, NULL, &e->checked, err);
    if (code) {
        free(copy);
        free(j);
        return code;
    }
    *j = (job){.step = copy, .step_size = size, .submitted_ns = now_ns()};
    pthread_mutex_lock(&e->lock);
    if (e->waiting >= QUEUE) {
        pthread_mutex_unlock(&e->lock);
        free_job(j);
        return cv_fail(err, CV_E_BUSY, "%d steps are waiting already", QUEUE);
    }
    *ticket = j->ticket = e->next_ticket++;
    if (e->tail) e->tail->next = j;
    else e->first = j;
    e->tail = j;
    e->waiting++;
    pthread_cond_signal(&e->work);
    pthread_mutex_unlock(&e->lock);
    return CV_OK;
}

int cv_collect(cv_engine *e, uint64_t ticket, void *out, size_t capacity, uint64_t *out_size, char *text, size_t text_size) {
    cv_err err = {text, text_size};
    if (!e || !out_size) return cv_fail(err, CV_E_ARGUMENT, "no engine");
    pthread_mutex_lock(&e->lock);
    job *before = NULL, *j = e->first;
    while (j && j->ticket != ticket) {
        before = j;
        j = j->next;
    }
    int code = CV_OK;
    if (!j) code = cv_fail(err, CV_E_ARGUMENT, "no ticket %llu", (unsigned long long)ticket);
    else if (!j->done) code = CV_E_AGAIN;
    else if (!j->code && j->result_size > capacity) {
        *out_size = j->result_size;
        code = CV_E_BUFFER;
    }
    if (!code) {
        if (before) before->next = j->next;
        else e->first = j->next;
        if (e->tail == j) e->tail = before;
    }
    pthread_mutex_unlock(&e->lock);
    if (code) return code;
    code = j->code;
    if (code) cv_fail(err, code, "%s", j->text);
    else if (out) {
        memcpy(out, j->result, j->result_size);
        *out_size = j->result_size;
    }
    free_job(j);
    return code;
}

void cv_abort(cv_engine *e) {
    if (!e) return;
    atomic_store(&e->stop, true);
    pthread_mutex_lock(&e->lock);
    pthread_cond_broadcast(&e->work);
    pthread_mutex_unlock(&e->lock);
}

int cv_stats(cv_engine *e, cv_stats_record *out) {
    if (!e || !out) return CV_E_ARGUMENT;
    pthread_mutex_lock(&e->lock);
    *out = e->stats;
    pthread_mutex_unlock(&e->lock);
    return CV_OK;
}

void cv_close(cv_engine *e) {
    if (!e) return;
    if (e->thread_started) {
        cv_abort(e);
        pthread_join(e->thread, NULL);
    }
    if (e->lock_ready) {
        pthread_mutex_destroy(&e->lock);
        pthread_cond_destroy(&e->work);
    }
    for (job *j = e->first, *next; j; j = next) {
        next = j->next;
        free_job(j);
    }
    for (int i = 0; i < 2; i++)
        if (e->event[i] >= 0) close(e->event[i]);
    if (e->backend) {
        cv_graph_close(e->backend, &e->act);
        e->backend->ops->close(e->backend);
    }
    cv_step_close(&e->parsed);
    cv_step_close(&e->checked);
    cv_sampler_close(&e->sampler);
    free(e->last);
    cv_model_close(e->model);
    free(e);
}
